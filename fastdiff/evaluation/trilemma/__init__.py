"""The generative trilemma of a model: quality, diversity and speed of its samples, by solver and network evaluations.

    fastdiff trilemma fashion-mnist --data train.gz --out out/trilemma

draws images of every point of the plan (`plan`), in parts that survive an interruption, measures them against real
images (`run`), times the settings alone (`speed`), and says which points are on the Pareto front (`report`), in a
table, a JSON and a picture (`picture`). OUT/points/NAME/ holds the images; NAME is SETTING-NFE.

Points are compared at equal numbers of images only, since the Frechet distance's bias depends on it.
"""
