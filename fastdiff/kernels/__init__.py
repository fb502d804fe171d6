"""Triton kernels for CUDA: one file per operation, each with its reference in plain torch beside it.

Nothing here is imported before a backend asks for it, and only the modules of operations need triton.

Conventions:

- An operation is a function of tensors that returns a `fastdiff.kernels.launch.Launch`. It allocates nothing and knows
  no stream; calling the launch runs it, and its ``reference`` computes the same into the same tensors. A backend keeps
  a flat list of launches and replays it, inside a CUDA graph or not. `library` alone runs what is no Triton kernel.
- Activations are NHWC [rows, H, W, C] in float32, bfloat16 or float16, all else is float32 or int64; sums are float32.
- Statistics are float32 [rows, strips, 2, C]: mean and sum of squared deviations of `fastdiff.program.STRIP` rows of
  pixels. They are combined as in Chan, Golub & LeVeque (1979), never as E[x^2] - mean^2, and never by float atomics.
- A norm is three vectors per row, float32 [rows, 3, C] (centre, scale, shift): y = (x - centre) scale + shift.
- What depends on the timestep is a table [entries, width] and, per row of the batch, its entry (int64 [rows]).
- A launch configuration is a frozen dataclass, one of the operation's ``CANDIDATES``. JSON files of ``configs/``, named
  after the GPU and written by a tuning command only, choose among them; heuristics do where no file knows.
"""
