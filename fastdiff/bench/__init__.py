"""``fastdiff bench``: the speed of a network on fastdiff's backends and on other libraries that are installed.

`networks` holds what is run. `inputs` defines a contender, `engines` and `peers` are the contenders, and `worker` runs
each of them in a process of its own. `timing` turns their turns into ratios with an interval and says when the machine
was too noisy. `run` keeps finished results in a file; `report` prints, draws and compares them. `machine` is the header
of every result. `job` and `profile` answer two other questions: how long a whole sampling job takes, and where the
native engine spends its time. `command` is the command line's entry; the room has no API of its own.
"""

__all__: list[str] = []
