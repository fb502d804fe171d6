"""The generative trilemma of a model: quality, diversity and speed of its samples, by solver and network evaluations.

    fastdiff trilemma fashion-mnist --data train.gz --out out/trilemma

`grid` plans the points. `run` draws their images, in parts so that an interruption loses little, and measures them
against real images. `speed` times the settings. `report` finds the points on the Pareto front and makes the table and
the JSON; `picture` draws them. The images of a point are in OUT/points/NAME/, where NAME is SETTING-NFE.

Points are compared at equal numbers of images only, as the bias of the Frechet distance depends on that number.
"""

__all__: list[str] = []
