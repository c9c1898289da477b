"""Table 1 of EComp: seven weightings, ten runs each, as one compiled program.

    python experiments/ecomp/study.py                     # Table 1, Figs. 2 to 5
    python experiments/ecomp/study.py --study similarity  # a sweep of the similarity weight
    python experiments/ecomp/study.py --study options     # each option alone, weights 1, 2, 1

Runs are written as they come (`<study>.json`); the same command goes on after an interruption.
Needs Fashion-MNIST in --data-dir or EVOJAX_SUITE_DATA.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evojax_suite import ecomp
from evojax_suite.data import load, with_whole_training_set
from evojax_suite.networks import NetworkConfig
from evojax_suite.runtime import loop
from evojax_suite.runtime.results import write_atomically
from evojax_suite.systems.ecomp import compression, feed_forward
from evojax_suite.systems.ecomp.feed_forward import Network
from evojax_suite.systems.ecomp.parent import evolution_images, from_flax, parent_training
from evojax_suite.types import Algorithm

STUDIES = {
    "weightings": ecomp.WEIGHTINGS,
    "similarity": tuple((1, weight, 1) for weight in (0, 1, 2, 4, 8, 16, 32)),
    "options": ((1, 2, 1),),
}
OPTIONS = {
    "none": {},
    "pruning activity": {"pruning": "activity"},
    "mutated layers hidden": {"mutated_layers": "hidden"},
    "final choice last": {"final_choice": "last"},
    "similarity Student's t": {"similarity": "student_t"},
    "similarity CKA": {"similarity": "cka"},
    "2 batches a generation": {"batches_per_generation": 2},
    "unbalanced": {"balanced": False},
    "shrinking": {"shrinking": True},
    "crossover aligned": {"crossover": "aligned"},
    "selection NSGA-II": {"selection": "nsga2"},
}
CURVES = ("accuracy_mean", "relative_size_mean", "similarity_loss_mean")


@dataclass(frozen=True)
class Options:
    study: Literal["weightings", "similarity", "options"] = "weightings"
    num_runs: int = 10
    """Runs of each weighting."""
    runs_at_once: int = 1
    """Runs that are mapped over together; 1 is fastest on a CPU, more on an accelerator."""
    dataset: str = "fashion_mnist"
    data_dir: Path | None = None
    runs_dir: Path = Path("runs/ecomp-study")
    """Where the parent is trained and kept."""
    output: Path = Path("experiments/ecomp")


def name_of(weighting) -> str:
    return ",".join(f"{weight:g}" for weight in weighting)


def evolve(key, algorithm: Algorithm, num_steps: int, params, data):
    """A whole run: its last state, and metrics with a leading axis of steps."""
    key_init, key_steps = jax.random.split(key)

    def step(state, index):
        return algorithm.step(jax.random.fold_in(key_steps, index), state, params, data)

    return jax.lax.scan(step, algorithm.init(key_init, params, data), jnp.arange(num_steps))


def program(config: ecomp.Config, num_images: int, runs_at_once: int):
    """Whole runs, from keys (R,) and parameters (R,) to results and metrics with that axis."""
    algorithm = ecomp.build(config)
    num_steps = ecomp.num_steps(config, num_images)

    def all_runs(keys, params, data):
        def one(run):
            key, params = run
            state, metrics = evolve(key, algorithm, num_steps, params, data)
            return algorithm.result(state, params, data), metrics

        if runs_at_once == 1:
            return jax.lax.map(one, (keys, params))
        return jax.lax.map(one, (keys, params), batch_size=runs_at_once)

    return jax.jit(all_runs)


@dataclass(frozen=True)
class Setting:
    """What all studies share: the parent and the three parts of the images it is judged on."""

    parent: Network
    data: ecomp.Data
    parts: dict[str, tuple[jax.Array, np.ndarray]]  # flat images, labels
    parent_predictions: dict[str, np.ndarray]
    parent_seconds: float

    def judge(self, network: Network) -> dict[str, float]:
        found = {}
        for part, (inputs, labels) in self.parts.items():
            predictions = predict(network, inputs)
            found[f"{part}_accuracy"] = float(np.mean(predictions == labels))
            found[f"{part}_agreement"] = float(
                np.mean(predictions == self.parent_predictions[part])
            )
        return found


def predict(network: Network, inputs: jax.Array) -> np.ndarray:
    return np.asarray(_predict(network, inputs))


@jax.jit
def _predict(network, inputs):
    return feed_forward.forward(network, inputs)[-1].argmax(-1)


def set_up(dataset_name: str, data_dir: Path | None, runs_dir: Path) -> Setting:
    dataset = with_whole_training_set(load(dataset_name, data_dir))
    places = evolution_images(dataset, None, ecomp.Config().batch_size)
    start = time.perf_counter()
    network = NetworkConfig(network="MLP", width=256)
    algorithm, data = parent_training(dataset, "unit", network, 4)
    trained = loop.run(algorithm, jax.random.key(0), None, data, 4, runs_dir / "parent")
    parent = from_flax(trained.state.fit.parameters, network, dataset)
    seconds = time.perf_counter() - start
    train = dataset.train
    parts = {
        "evolution": (train.images[places], train.labels[places]),
        "other_training": (np.delete(train.images, places, 0), np.delete(train.labels, places)),
        "test": (dataset.test.images, dataset.test.labels),
    }
    data = ecomp.make_data(parent, *parts["evolution"])
    flat = {
        part: (jnp.asarray(images.reshape(len(images), -1) / np.float32(255)), labels)
        for part, (images, labels) in parts.items()
    }
    predictions = {part: predict(parent, inputs) for part, (inputs, _) in flat.items()}
    return Setting(parent, data, flat, predictions, seconds)


def main(options: Options) -> None:
    setting = set_up(options.dataset, options.data_dir, options.runs_dir)
    data, parent = setting.data, setting.parent
    num_images = len(data.labels)
    keys = jax.random.split(jax.random.key(0), options.num_runs)

    def params_of(weighting):
        values = [jnp.full(options.num_runs, float(weight)) for weight in weighting]
        rest = jax.tree.map(lambda value: jnp.full(options.num_runs, value), ecomp.Params())
        return rest.replace(
            accuracy_weight=values[0], similarity_weight=values[1], compression_weight=values[2]
        )

    path = options.output / f"{options.study}.json"
    about = {
        "device": jax.devices()[0].device_kind,
        "num_runs": options.num_runs,
        "parent_test_accuracy": float(
            np.mean(setting.parent_predictions["test"] == setting.parts["test"][1])
        ),
        "parent_seconds": setting.parent_seconds,
    }
    rows = []
    if path.exists():
        before = json.loads(path.read_text())
        if before["num_runs"] == options.num_runs:
            rows = before["rows"]
            about |= {"parent_seconds": before["parent_seconds"]}
    done = {row["weighting"] for row in rows}
    cases = [(name_of(w), w, {}) for w in STUDIES[options.study]]
    if options.study == "options":
        (weighting,) = STUDIES["options"]
        cases = [(name, weighting, changes) for name, changes in OPTIONS.items()]
    compiled, compiled_for = None, None
    for name, weighting, changes in cases:
        if name in done:
            continue
        config = ecomp.Config(**changes)
        if compiled is None or compiled_for != config:
            start = time.perf_counter()
            runs = program(config, num_images, options.runs_at_once)
            compiled = runs.lower(keys, params_of(weighting), data).compile()
            compiled_for, compile_seconds = config, time.perf_counter() - start
        start = time.perf_counter()
        results, metrics = jax.device_get(compiled(keys, params_of(weighting), data))
        seconds = time.perf_counter() - start
        for run in range(options.num_runs):
            best = jax.tree.map(lambda leaf, run=run: leaf[run], results)
            network = compression.trimmed(best.network, best.sizes)
            row = {
                "weighting": name,
                "run": run,
                "hidden_units": best.sizes,
                "relative_size": best.sizes.sum() / sum(feed_forward.hidden_sizes(parent)),
                "num_parameters": sum(array.size for layer in network for array in layer),
                "num_mutations": best.num_mutations,
                "num_failed": metrics.num_failed[run].sum(),
                "seconds": seconds / options.num_runs,
                "compile_seconds": compile_seconds,
                **setting.judge(network),
                "curves": {
                    curve: np.float64(getattr(metrics, curve)[run]).round(4)[
                        : config.num_generations + 1
                    ]
                    for curve in CURVES
                },
            }
            rows.append(json.loads(json.dumps(row, default=lambda value: value.tolist())))
        write_atomically(path, json.dumps(about | {"rows": rows}) + "\n")
        mine = [row for row in rows if row["weighting"] == name]
        print(
            f"{name}: test accuracy {spread(mine, 'test_accuracy')}, relative size "
            f"{spread(mine, 'relative_size')}, {seconds / options.num_runs:.2f} s a run, "
            f"compilation {compile_seconds:.1f} s",
            flush=True,
        )
    print(table(rows))
    if options.study != "options":
        draw(options, rows, about)


def spread(rows: list[dict], name: str) -> str:
    values = 100 * np.array([row[name] for row in rows])
    return f"{values.mean():.1f} ± {values.std():.1f}"


def table(rows: list[dict]) -> str:
    header = (
        "| weights a, s, c | test accuracy | relative size | agreement: evolution's images | other "
        "training images | test images | similarity loss, last 20 generations | correlation of "
        "accuracy and loss | generations to the last size | s a run |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [header]
    for weighting in dict.fromkeys(row["weighting"] for row in rows):
        mine = [row for row in rows if row["weighting"] == weighting]
        settled = [settles(row) for row in mine]
        cells = [spread(mine, name) for name in (
            "test_accuracy", "relative_size", "evolution_agreement", "other_training_agreement",
            "test_agreement",
        )]  # fmt: skip
        losses = [np.mean(row["curves"]["similarity_loss_mean"][-20:]) for row in mine]
        together = [
            np.corrcoef(row["curves"]["accuracy_mean"], row["curves"]["similarity_loss_mean"])[0, 1]
            for row in mine
        ]
        cells += [f"{np.mean(losses):.3f} ± {np.std(losses):.3f}"]
        cells += [f"{np.mean(together):.2f} ± {np.std(together):.2f}"]
        cells += [f"{np.median(settled):.0f} ({min(settled)}-{max(settled)})"]
        cells += [f"{np.mean([row['seconds'] for row in mine]):.1f}"]
        lines.append(f"| {weighting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settles(row: dict) -> int:
    """The generation from which the mean relative size stays within 1% of where it ends."""
    sizes = np.array(row["curves"]["relative_size_mean"])
    away = np.flatnonzero(np.abs(sizes - sizes[-1]) > 0.01)
    return int(away[-1]) + 1 if away.size else 0


def save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw(options: Options, rows: list[dict], about: dict) -> None:
    weightings = list(dict.fromkeys(row["weighting"] for row in rows))
    colors = dict(zip(weightings, (f"C{i}" for i in range(10)), strict=False))
    if options.study == "weightings":
        weightings = [w for w in weightings if w != "0,0,1"]  # as in the paper's figures
        for number, curve in zip((2, 3, 4), CURVES, strict=True):
            figure = Figure(figsize=(13, 5))
            axes = figure.subplots(2, 5, sharex=True, sharey=True).ravel()
            for run, panel in enumerate(axes[: options.num_runs]):
                for row in rows:
                    if row["run"] == run and row["weighting"] in weightings:
                        values = np.array(row["curves"][curve])[::3]
                        generations = 3 * np.arange(len(values))
                        weighting = row["weighting"]
                        panel.plot(
                            generations, values, lw=1, color=colors[weighting], label=weighting
                        )
                panel.set_title(f"run {run + 1}", fontsize=8)
                panel.grid(alpha=0.3)
            axes[0].legend(frameon=False, fontsize=6)
            figure.supxlabel("generation", fontsize=9)
            figure.supylabel(curve.replace("_", " "), fontsize=9)
            figure.tight_layout()
            save(figure, options.output / f"figure-{number}.png")
    figure = Figure(figsize=(11, 3.6))
    for index, (name, title) in enumerate(
        (
            ("test_accuracy", "test accuracy (%)"),
            ("relative_size", "relative size (%)"),
            ("test_agreement", "agreement with the parent, test images (%)"),
        )
    ):
        panel = figure.add_subplot(1, 3, index + 1)
        values = [
            [100 * row[name] for row in rows if row["weighting"] == weighting]
            for weighting in weightings
        ]
        panel.boxplot(values, tick_labels=weightings, widths=0.6)
        if name == "test_accuracy":
            panel.axhline(100 * about["parent_test_accuracy"], color="black", ls="--", lw=0.8)
        panel.set_title(title, fontsize=9)
        panel.tick_params(axis="x", labelsize=7)
        panel.grid(alpha=0.3, axis="y")
    figure.supxlabel("weights of accuracy, similarity, compression", fontsize=8)
    figure.tight_layout()
    name = "figure-5.png" if options.study == "weightings" else "similarity.png"
    save(figure, options.output / name)


if __name__ == "__main__":
    main(tyro.cli(Options))
