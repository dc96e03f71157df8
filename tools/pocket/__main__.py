"""The command line: `python -m tools.pocket STAGE ...`; every stage takes up where it stopped."""

import argparse
import logging

from tools.pocket import drawings, export, judge, latents, pool, score, subjects, train, vae

STAGES = {
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
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pocket", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in STAGES if "all" in arguments.stages else arguments.stages:
        STAGES[name]()


if __name__ == "__main__":
    main()
