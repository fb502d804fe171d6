"""Everything that needs an NVIDIA GPU, in one command: checks, tuning and speeds. Offline, in the Python that runs it.

    python benchmarks/gpu                                  # make gpu
    python benchmarks/gpu --resume earlier/gpu.json        # goes on where an earlier call ran out of time
    python benchmarks/gpu --parts graphs,"cifar10 B=1" --diffusers folder/of/wheels
    python benchmarks/gpu --dry-run                        # on a CPU, tiny: the code, not the card

Writes gpu.json, gpu.md (the same to read) and the tuned launch configurations into --out, else $FASTDIFF_GPU_OUT, else
$OUT, else out/gpu. Each part runs in a process of its own, so that an error, even one that costs the CUDA context,
loses that part alone; its traceback is in the JSON. A call ends within --seconds; what it did not reach waits for the
next. Nothing whose check is red gets a speed. Exit code: 0 all well, 1 something failed, 3 something was not reached.

In a dry run kernels are interpreted, torch.compile is left out, and tests/support/fake_cuda.py stands in for
CUDA graphs.
"""

# Each module imports only from those before it: run, timing, networks, machine, checks, tuning, jobs, speeds, report,
# call. torch and fastdiff are imported in functions: the process that starts the parts needs neither, so that an import
# that fails is one part's failure.
