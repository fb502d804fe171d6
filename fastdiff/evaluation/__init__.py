"""Sample quality: Frechet distances and related measures, and the trilemma of quality, speed and diversity."""
