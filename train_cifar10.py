"""Train a network on CIFAR-10, CIFAR-100 or the embedded digits.

    python3 train_cifar10.py --model=ResNet56_DoubleShared --shared_rank=16 --unique_rank=1 --lambdaR=10

`--list_models` prints the networks, `--model=X --help` the flags of one. A published row is an argument file:
`python3 train_cifar10.py @recipes/cifar10-resnet56-s16u1-double`.
"""

import startup

with startup.importing(__name__):
    import dataloader
    import engine
    import utils
    from engine import cli, run_images
    from models import create_model, create_objective, registry
    from models.teachers import Teacher
    from reporting import run_report

SCRIPT = cli.Script(__doc__, datasets=("cifar10", "cifar100", "digits"), model="ResNet56_DoubleShared", training=True)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = engine.start_device(args.visible_device, args.parallel)
    cli.complete(args, device)
    cli.check_network(args, 32)
    utils.seed_everything(args.seed, args.deterministic)
    model = create_model(args.model, args.dataset, **args.model_flags)
    model.made_for = model.made_for.updated(vars(args))
    objective = create_objective(args.model, args.dataset, **args.objective_flags)
    recipe = engine.Recipe.of(args)
    engine.check(objective, recipe, device)
    if teacher := Teacher.of(objective, args.dataset):
        objective.teacher = teacher.build(model)
    if args.checkpoint:
        args.checkpoint.load_into(model, args.new_head)
        args.model_flags = dict(model.built_as.flags)  # weights of another project may need one more
    data = load_data(args, device)
    folder = args.save or f"checkpoint/{cli.folder_name(args)}"
    run = engine.Run(folder, cli.all_flags(args), args.resume, cli.default_flags(SCRIPT, args))
    utils.say(f"{args.model} on {data.source}; {engine.devices_in_words()}; run in {run.folder}")
    engine.fit(model, objective, data, run, recipe, device, args.checkpoint)
    run_report.of_run(model, data, run)
    run.close()


def load_data(args, device):
    """The images, or with `--fallback` the digits, with a loud warning, if no source of the dataset works."""
    options = dict(padding_mode=args.padding_mode, seed=args.seed)
    own = dict(subset=args.subset, valid=run_images.held_out(args), mean=args.mean, std=args.std)
    try:
        return dataloader.cifar(args.dataset, args.dataset_path, args.batch_size, device, **own, **options)
    except dataloader.NoSource as error:
        if not args.fallback:
            raise
        if registry.SAME_NETWORKS[args.fallback] != args.dataset:
            same = registry.SAME_NETWORKS[args.fallback]
            raise utils.UserError(f"{error}; --fallback={args.fallback} stands in for {same} only") from error
        utils.say(f"!!! {error}\n!!! Falling back to {args.fallback}: what follows is NOT {args.dataset}. !!!")
        args.dataset, args.subset, args.mean, args.std = args.fallback, None, None, None
        return dataloader.cifar(args.dataset, None, args.batch_size, device, valid=args.valid, **options)


if __name__ == "__main__":
    cli.run(main)
