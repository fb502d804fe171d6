"""Draw images in a pipeline of Ray Data, where they are processed at once and no folder of them is kept.

python ray_data.py          # needs Ray: pip install 'ray[data]'; writes the folder boots.parquet

An image depends only on the settings and its index, so a block that Ray draws again, because an actor has died, has the
same images. Where the images are to stay in files, `fastdiff generate --ray` is simpler, and goes on after any end.
"""

import numpy as np
import ray

import fastdiff

IMAGES, BATCH, STEPS = 32, 8, 2


class Drawer:
    """An actor that draws the images of the indices that it is given."""

    def __init__(self) -> None:
        self.sampler = fastdiff.Sampler.from_pretrained("fashion-mnist", determinism="bitwise")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add the pixels, uint8 [n, 32 * 32], to the indices."""
        indices = batch["id"]
        out = self.sampler.sample(len(indices), index=indices.tolist(), labels=9, steps=STEPS)
        pixels = ((out.images + 1) * 127.5).round().byte().flatten(1)
        return {"index": indices, "pixels": pixels.numpy()}


def main() -> None:
    """Draw the images with all processors but one."""
    # On a cluster: ray.init("auto"). Little passes through the store of objects, and nobody looks at the dashboard.
    ray.init("local", include_dashboard=False, object_store_memory=200 << 20)
    # Reading needs a processor too: with a pool of all of them the pipeline would wait for ever.
    pool = int(ray.cluster_resources()["CPU"]) - 1
    if pool < 1:
        raise SystemExit("this needs two processors: one for an actor, and one for reading")
    # Actors that die are replaced. An error in an actor ends the pipeline, as it would come again: leave Ray's
    # DataContext.actor_task_retry_on_errors as it is.
    images = ray.data.range(IMAGES).map_batches(Drawer, batch_size=BATCH, concurrency=pool, num_cpus=1)
    images.sort("index").write_parquet("boots.parquet", mode="overwrite")
    ray.shutdown()


if __name__ == "__main__":
    main()
