"""Evaluate a network on CIFAR-10, CIFAR-100 or the embedded digits: accuracy, MACs and latency at every point.

    python3 eval_cifar10.py --pretrained=<file or published name> --model=ResNet56_DoubleShared --shared_rank=16

Files written by this project and published names need no --model and no flags: they know their own.
"""

import cli
import dataloader
import report
import utils
from models import create_model, load_checkpoint

SCRIPT = cli.Script(__doc__, datasets=("cifar10", "cifar100", "digits"), model="ResNet56_DoubleShared", training=False)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = utils.start_device(args.visible_device)
    model = create_model(args.model, args.dataset, **args.model_flags)
    loaded = load_checkpoint(model, args.pretrained, args.dataset, args.cache)
    utils.say(f"{loaded.path}: {loaded.format}")
    options = dict(valid=cli.held_out(loaded), mean=args.mean, std=args.std, seed=args.seed)
    data = dataloader.cifar(args.dataset, args.dataset_path, args.batch_size, device, **options)
    report.of_evaluation(model, data, args, device, loaded.path)


if __name__ == "__main__":
    cli.run(main)
