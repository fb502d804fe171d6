"""Tables that repeat the loops of other code bases: diffusers, OpenAI's guided-diffusion and the original DDPM."""
