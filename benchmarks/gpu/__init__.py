"""Run all checks, tuning and speed measurements that need an NVIDIA GPU, offline and in the Python that runs this.

    python benchmarks/gpu                                  # make gpu
    python benchmarks/gpu --resume earlier/gpu.json        # continues where an earlier call ran out of time
    python benchmarks/gpu --parts graphs,"cifar10 B=1" --diffusers folder/of/wheels
    python benchmarks/gpu --dry-run                        # on a CPU, with tiny networks: tests this code

Writes gpu.json, gpu.md (the same as text), items.jsonl and the tuned launch configurations to --out; the default is
$FASTDIFF_GPU_OUT, $OUT or out/gpu. Each part runs in a process of its own, so that an error, even one that destroys
the CUDA context, affects that part only; its traceback is in the JSON. A part consists of items, whose results are in
items.jsonl as soon as they are known; after a lost context the part goes on in a new process with the next item. A call
ends within --seconds, and the next one goes on with the items that are left. No speed is measured for anything whose
check fails. The last lines of the output are a summary. Exit code: 0 success, 1 a part failed, 3 a part was not
reached.

In a dry run kernels are interpreted, torch.compile is not used, and tests/support/fake_cuda.py replaces CUDA graphs.
"""

# Each module imports only from those before it: run, timing, networks, machine, lists, model, jobs, compiling,
# profiling, checks, tuning, speeds, report, call. Functions import torch and fastdiff, so that the process that starts
# the parts needs neither, and an import that fails affects one part only.
