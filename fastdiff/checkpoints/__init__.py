"""Checkpoints: loading models from untrusted files, saving them, and converting between the layouts of code bases.

```python
from fastdiff import checkpoint  # another name of fastdiff.checkpoints

model = checkpoint.load("folder")
checkpoint.save_folder("copy", model.unet, model.schedule, model.prediction)
```
"""

from fastdiff.checkpoints.convert import FORMATS, convert
from fastdiff.checkpoints.layouts import LAYOUTS
from fastdiff.checkpoints.loading import (
    Pretrained,
    PretrainedText,
    builtin_models,
    load,
    load_text,
    load_weights,
    read_scheduler,
    schedule_of,
)
from fastdiff.checkpoints.originals import PRESETS
from fastdiff.checkpoints.reading import weights_digest
from fastdiff.checkpoints.saving import save_folder, save_pipeline, save_unet

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "PRESETS",
    "Pretrained",
    "PretrainedText",
    "builtin_models",
    "convert",
    "load",
    "load_text",
    "load_weights",
    "read_scheduler",
    "save_folder",
    "save_pipeline",
    "save_unet",
    "schedule_of",
    "weights_digest",
]
