"""``fastdiff bench``: how fast a network runs here, on fastdiff's backends and on what else is installed.

`networks` are what is run, `engines` the ways to run it, each in a process of its own (`worker`); `timing` turns their
turns into ratios with an interval, and says when the machine was too noisy; `run` keeps what is finished in a file;
`report` prints, draws and compares. `job` and `profile` are the two other questions: a whole sampling job, and where
the native engine's time goes.
"""
