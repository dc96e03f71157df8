"""The command line: `python -m tools.pocket STAGE ...`; every stage takes up where it stopped."""

import argparse
import logging
from functools import partial
from pathlib import Path

from tools.pocket import bench, drawings, export, figures, judge, latents, pool, score, subjects, train, vae
from tools.pocket.recipe import BASE, DOCS, UNET


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pocket", description=__doc__)
    parser.add_argument("--images", type=int, default=UNET.images, help="train the UNet until it has seen so many")
    parser.add_argument("--warm-start", action="store_true", help="without a snapshot, go on from the exported weights")
    parser.add_argument("--base", type=Path, default=BASE, help="the folder that `export` writes and `bench` reads")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where `bench` leaves its report")
    stages = {
        "fetch": drawings.fetch,
        "subjects": subjects.write,
        "data": pool.draw,
        "vae": vae.make,
        "latents": latents.make,
        "judge": judge.make,
        "unet": train.make,
        "cool": train.cool,
        "score": score.make,
        "export": export.make,
        "figures": figures.make,
        "bench": bench.make,
    }
    parser.add_argument(
        "stages", nargs="+", choices=[*stages, "all"], metavar="STAGE", help=f"{', '.join(stages)}, all"
    )
    arguments = parser.parse_args()
    stages["unet"] = partial(train.make, images=arguments.images, warm=arguments.warm_start)
    stages["vae"] = partial(vae.make, warm=arguments.warm_start)
    stages["export"] = partial(export.make, folder=arguments.base)
    stages["bench"] = partial(bench.make, base=arguments.base, docs=arguments.docs)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in stages if "all" in arguments.stages else arguments.stages:
        stages[name]()


if __name__ == "__main__":
    main()
