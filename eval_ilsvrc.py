"""Evaluate a network on ImageNet (ILSVRC2012), or on any folder of images with val/.

    python3 eval_ilsvrc.py --dataset_path=<path> --pretrained=<file or published name> --model=ResNet34_DoubleShared

Files written by this project and published names need no --model and no flags: they know their own.
"""

import cli
import dataloader
import report
import utils
from models import create_model, load_checkpoint

SCRIPT = cli.Script(
    __doc__,
    datasets=("ilsvrc",),
    model="ResNet34_DoubleShared",
    training=False,
    add_flags=cli.add_image_folder,
)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = utils.start_device(args.visible_device)
    data = dataloader.imagefolder(
        args.dataset_path,
        args.batch_size,
        device,
        workers=args.workers,
        resize=args.resize,
        crop=args.crop,
        train=False,
        seed=args.seed,
        **cli.given(mean=args.mean, std=args.std),
    )
    model = create_model(args.model, args.dataset, len(data.classes), **args.model_flags)
    loaded = load_checkpoint(model, args.pretrained, args.dataset, args.cache)
    utils.say(f"{loaded.path}: {loaded.format}")
    report.of_evaluation(model, data, args, device, loaded.path)


if __name__ == "__main__":
    cli.run(main)
