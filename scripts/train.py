"""Train any model on any data set by name.

Stop it at any time and call it again with the same options: it goes on from its last checkpoint and
ends with the same weights, bit for bit. The folder gets the options, a log of JSON lines, the
checkpoints, the trained network with its normalisation statistics, and the result.

  python scripts/train.py
  python scripts/train.py --dataset mnist --model-options '{"widths": [256, 256]}' --epochs 10
  python scripts/train.py --dataset cifar10 --model resnet20 --augment pad_crop_flip --epochs 200
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Literal

import jax
import optax
import tyro

import geojax
from geojax import batches, checkpoint, datasets, fit, models, objectives, report, statistics


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a training run."""

    dataset: str = "digits"
    """The data set: digits, two_spirals, regression_1d, mnist, fashion_mnist, cifar10, cifar100."""
    data_dir: pathlib.Path | None = None
    """Where archives and prepared folders lie; by default GEOJAX_DATA_DIR."""
    download: bool = False
    """Whether tensorflow-datasets may fetch the data set."""
    model: str = "mlp"
    """The model, by its name in `geojax.models.NAMES`."""
    model_options: str = "{}"
    """The model's options as JSON; the number of classes is filled in."""
    epochs: int = 20
    """Passes over the training part."""
    batch_size: int = 128
    """Examples in a step; what is left over at the end of an epoch is left out of it."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD with momentum and coupled decay, Adam with coupled decay, or AdamW."""
    learning_rate: float = 0.05
    """The highest learning rate."""
    momentum: float = 0.9
    """For sgd."""
    weight_decay: float = 5e-4
    """The factor of the weights in the gradient (sgd, adam) or in the update (adamw)."""
    schedule: Literal["cosine", "three_phase", "constant"] = "cosine"
    """How the learning rate falls."""
    warmup_epochs: float = 0.0
    """Linear warm-up before the cosine."""
    augment: datasets.Augmentation = "none"
    """Random changes of the training images."""
    seed: int = 0
    """The seed of initial weights, order, dropout and augmentation."""
    out: pathlib.Path = pathlib.Path("out/train")
    """The folder of the run."""
    checkpoint_every: float = 1.0
    """Epochs between checkpoints."""
    evaluate_every: float = 1.0
    """Epochs between measurements on the validation part."""


def make_optimizer(options: Options, num_steps: int, steps_per_epoch: int):
    if options.schedule == "three_phase":
        rate = fit.three_phase(options.learning_rate, num_steps)
    elif options.schedule == "cosine":
        warmup = round(options.warmup_epochs * steps_per_epoch)
        rate = fit.warmup_cosine(options.learning_rate, num_steps, warmup_steps=warmup)
    else:
        rate = options.learning_rate
    if options.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=options.weight_decay)
    rule = optax.adam(rate) if options.optimizer == "adam" else optax.sgd(rate, options.momentum)
    return optax.chain(optax.add_decayed_weights(options.weight_decay), rule)


def main(options: Options) -> None:
    start = time.perf_counter()
    try:
        chosen = json.loads(options.model_options)
    except json.JSONDecodeError as error:
        sys.exit(f"train: --model-options is no JSON object: {error}.")
    source = datasets.load_augmented(
        options.dataset, options.data_dir, options.augment, download=options.download
    )
    data = source.data
    task = "regression" if data.num_classes is None else "classification"
    if "num_classes" in models.options(options.model):
        chosen = {"num_classes": data.num_classes or data.train.labels.shape[-1]} | chosen
    model = models.build(options.model, **chosen)
    key_init, key_order, key_run = jax.random.split(jax.random.key(options.seed), 3)
    params, state = model.init(key_init, data.train.inputs[:1])
    order = batches.split(source.train, options.batch_size, key=key_order, drop_remainder=True)
    # A folder is claimed once the options are known to be good; where the data and the results lie
    # does not change the run.
    report.claim(
        options.out, dataclasses.asdict(options), may_differ=("data_dir", "out", "download")
    )
    num_steps = options.epochs * len(order)
    print(
        f"geojax {geojax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
        f"{options.model} with {sum(x.size for x in jax.tree.leaves(params)):,} weights on "
        f"{options.dataset} ({data.source}): {len(data.train.labels)} training examples, "
        f"{num_steps} steps"
    )
    on_train = batches.split(data.train, 1000)
    metrics_fn = objectives.metrics_with_state(model.apply, task)
    held_out = data.validation if len(data.validation.labels) else data.train
    on_validation = batches.mean(metrics_fn, batches.split(held_out, 1000))
    name = "validation" if held_out is data.validation else "train"

    def evaluate(params, step):
        del step
        fresh = statistics.refresh(model.apply, params, state, batches.take(on_train, 5))
        return {f"{name}_{k}": v for k, v in on_validation(params, fresh).items()}

    def steps(epochs):
        return max(1, round(epochs * len(order)))

    result = fit.fit(
        objectives.loss(model.apply, state, task),
        params,
        order,
        make_optimizer(options, num_steps, len(order)),
        num_steps,
        key=key_run,
        transform=source.transform,
        evaluate=evaluate,
        evaluate_every=steps(options.evaluate_every),
        checkpoint=checkpoint.Checkpointer(
            options.out / "checkpoints", every=steps(options.checkpoint_every)
        ),
        log=options.out / "log.jsonl",
        log_every=max(1, len(order) // 10),
    )
    if result.start:
        print(f"went on from step {result.start}")
    state = statistics.refresh(model.apply, result.params, state, on_train)
    rows = []
    for part in ("train", "validation", "test"):
        examples = getattr(data, part)
        if len(examples.labels):
            found = batches.mean(metrics_fn, batches.split(examples, 1000))(result.params, state)
            rows.append(
                {"part": part, "examples": len(examples.labels)}
                | {key: float(value) for key, value in found.items()}
            )
    checkpoint.save_network(
        options.out / "network", result.params, state, model=options.model, options=chosen,
        dataset=options.dataset, seed=options.seed,
        metadata={"training": json.loads(json.dumps(dataclasses.asdict(options), default=str))},
    )  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(report.text_table(rows))
    print(f"{options.out / 'network'}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"train: {error}")
    except KeyboardInterrupt:
        sys.exit("train: stopped; the same command goes on from the last checkpoint.")
