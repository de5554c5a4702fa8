"""Choose the best checkpoint of the bundled model, measure it on held-out frames, and bundle it.

`python -m amygdala_lib.demo.release` runs after training (`make demo-model` does both). Checkpoint,
layer and strength are chosen on validation frames; every figure in the model card is measured on
test frames, which nothing was chosen on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from ..artefacts import provenance, replacing, write_json
from ..capture import capture
from ..directions import Directions, extract
from ..errors import ModelError
from ..models import DEMO_FOLDER, LanguageModel, load_model
from . import evaluate
from .affect_world import AffectWorld
from .evaluate import SteeringPoint

LAST_CHECKPOINTS = 3
LAYERS = (1, 2, 3)
STRENGTHS = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
GOAL_TARGET, GOAL_PERPLEXITY = 0.6, 2.0
SAFE_PERPLEXITY = 1.8  # chosen below the goal, for what is chosen on few prompts regresses


def steers(table: pd.DataFrame) -> pd.Series:
    """Which states of a steering table reach the target share without losing fluency."""
    return (table["target"] >= GOAL_TARGET) & (table["perplexity"] <= GOAL_PERPLEXITY)


def directions_of(lm: LanguageModel, world: AffectWorld) -> Directions:
    corpus = world.corpus()
    acts = capture(lm, corpus, range(len(lm.layers)), pool="mean", progress=False)
    return extract(acts, corpus)


def choose_checkpoint(folders: list[Path], world: AffectWorld) -> Path:
    """The checkpoint that carries and steers best on validation frames, among the last few."""
    best, best_score = folders[-1], -1.0
    for folder in tqdm(folders[-LAST_CHECKPOINTS:], desc="choosing a checkpoint"):
        lm = load_model(folder)
        seen = evaluate.carry(lm, world, "train", per_state=8).mean()
        unseen = evaluate.carry(lm, world, "validation", per_state=8).mean()
        steered = evaluate.steering(
            lm, directions_of(lm, world), world, "validation", SteeringPoint(2, 0.7), per_state=8
        )
        score = seen + unseen + steered["target"].mean()
        tqdm.write(
            f"{folder.name}: carry {seen:.3f} seen, {unseen:.3f} unseen; "
            f"steering {steered['target'].mean():.3f}"
        )
        if score > best_score:
            best, best_score = folder, score
    return best


def choose_points(
    lm: LanguageModel, dirs: Directions, world: AffectWorld
) -> dict[str, SteeringPoint]:
    """One layer for all states and a strength for each, by what they write on validation prompts.

    The layer is the one where most states steer at the middle strength. A state's strength, as a
    user with a slider would set it, is the one with the largest target share among those whose
    perplexity ratio is safe, or the weakest if none is.
    """

    def steered(layer: int, strength: float) -> pd.DataFrame:
        table = evaluate.steering(lm, dirs, world, "validation", SteeringPoint(layer, strength))
        tqdm.write(
            f"layer {layer} at {strength}: {steers(table).mean():.2f} of the states steer, "
            f"target share {table['target'].mean():.2f}, "
            f"perplexity x{table['perplexity'].median():.2f}"
        )
        return table

    middle = STRENGTHS[len(STRENGTHS) // 2]
    by_layer = {layer: steered(layer, middle) for layer in LAYERS}
    layer = max(by_layer, key=lambda i: (steers(by_layer[i]).mean(), by_layer[i]["target"].mean()))
    tables = {s: by_layer[layer] if s == middle else steered(layer, s) for s in STRENGTHS}
    points = {}
    for state in world.states:
        safe = [s for s in STRENGTHS if tables[s].loc[state, "perplexity"] <= SAFE_PERPLEXITY]
        strength = max(safe or STRENGTHS[:1], key=lambda s: tables[s].loc[state, "target"])
        points[state] = SteeringPoint(layer, strength)
    return points


def measure(lm: LanguageModel, world: AffectWorld, points: dict[str, SteeringPoint]) -> dict:
    """Every figure of the model card, on test frames; shares and ratios."""
    corpus = world.corpus()
    layers = list(range(len(lm.layers)))
    mean = evaluate.reading(lm, corpus, pool="mean", layers=[-1, *layers])
    last = evaluate.reading(lm, corpus, pool="last", layers=layers)
    dirs = directions_of(lm, world)
    steered = evaluate.steering(lm, dirs, world, "test", points, per_state=32)
    control = evaluate.steering(
        lm, evaluate.random_directions(dirs), world, "test", points, per_state=32
    )
    return {
        "reading": {
            pool: {
                str(layer): {
                    "mean": group["auroc"].mean(),
                    "worst": group["auroc"].min(),
                    "worst_state": group.loc[group["auroc"].idxmin(), "state"],
                }
                for layer, group in table.groupby("layer")
            }
            for pool, table in (("mean", mean), ("last", last))
        },
        "carry": {
            split: evaluate.carry(lm, world, split, per_state=32).to_dict()
            for split in ("train", "test")
        },
        "steering": {
            "states": steered.to_dict("index"),
            "random_directions": control.to_dict("index"),
        },
        "self_report": {
            "steered": evaluate.self_report(lm, dirs, world, points).to_dict(),
            "unsteered": evaluate.self_report(lm, dirs, world, None).to_dict(),
        },
    }


def card(lm: LanguageModel, world: AffectWorld, figures: dict) -> str:
    """The model card: `card.md` with the figures of `measure` filled in."""
    reading, carry, steering = figures["reading"], figures["carry"], figures["steering"]
    mean, last = _best_layer(reading["mean"]), _best_layer(reading["last"])
    steered = pd.DataFrame.from_dict(steering["states"], orient="index")
    control = pd.DataFrame.from_dict(steering["random_directions"], orient="index")
    ranks = {name: pd.Series(ranks) for name, ranks in figures["self_report"].items()}
    table = pd.DataFrame({"seen cue": carry["train"], "held-out cue": carry["test"]}).join(
        steered.drop(columns=["layer"])
    )
    return (
        Path(__file__)
        .with_name("card.md")
        .read_text(encoding="utf-8")
        .format(
            parameters=sum(p.numel() for p in lm.model.parameters()) / 1e6,
            layers=len(lm.layers),
            hidden=lm.hidden_size,
            n_states=len(world.states),
            states=", ".join(world.states),
            mean_layer=mean,
            mean=reading["mean"][mean],
            last_layer=last,
            last=reading["last"][last],
            embedding=reading["mean"]["-1"],
            carry_seen=table["seen cue"].mean(),
            carry_unseen=table["held-out cue"].mean(),
            steering_layer=steered["layer"].iloc[0],
            weakest=steered["strength"].min(),
            strongest=steered["strength"].max(),
            steered=int(steers(steered).sum()),
            goal_target=GOAL_TARGET,
            goal_perplexity=GOAL_PERPLEXITY,
            control=control.mean(),
            report_steered=(ranks["steered"] == 1).mean(),
            report_unsteered=(ranks["unsteered"] == 1).mean(),
            table=_markdown(table.round(3)),
            stories=ten_stories(lm, world),
        )
    )


def _best_layer(by_layer: dict[str, dict]) -> str:
    return max((layer for layer in by_layer if layer != "-1"), key=lambda i: by_layer[i]["mean"])


def _markdown(table: pd.DataFrame) -> str:
    head = ["state", *table.columns]
    rows = [[str(name), *(f"{value:g}" for value in row)] for name, *row in table.itertuples()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def ten_stories(lm: LanguageModel, world: AffectWorld, seed: int = 10) -> str:
    rng, prompts = random.Random(seed), []
    for number, state in enumerate(rng.sample(world.states, 10)):
        narrator = world.narrator(rng, "test")
        place = rng.choice(list(world.grammar["places"]["test"]))
        told = [world.opening(rng, narrator, place).text]
        if number < 8:
            told.append(world.cue(rng, state, narrator, "train").text)
        prompts.append(" ".join(told))
    written = evaluate.write(lm, prompts, seed=seed, new_tokens=80)
    stories = []
    for prompt, text in zip(prompts, written, strict=True):
        finished = re.match(r'.*[.?]"?(?=\s|$)', text, re.DOTALL)
        stories.append(f"> **{prompt}**{finished[0] if finished else ''}")
    return "\n\n".join(stories)


def release(checkpoints: Path, out: Path = DEMO_FOLDER) -> None:
    """Choose, measure and write the bundled model; nothing is written before all is measured.

    Raises ModelError if `checkpoints` holds none.
    """
    folders = sorted(checkpoints.glob("step-*"))
    if not folders:
        raise ModelError(
            f"no checkpoints in {checkpoints}: run `python -m amygdala_lib.demo.train`"
        )
    world = AffectWorld()
    chosen = choose_checkpoint(folders, world)
    lm = load_model(chosen)
    # What is measured is what is bundled: bfloat16 weights, read as float32.
    lm.model.to(torch.bfloat16).to(torch.float32)
    points = choose_points(lm, directions_of(lm, world), world)
    figures = _rounded(measure(lm, world, points))
    text = card(lm, world, figures)

    shutil.rmtree(out, ignore_errors=True)
    lm.tokenizer.save_pretrained(out)
    lm.model.to(torch.bfloat16).save_pretrained(out)
    write_json(out / "evaluation.json", {**figures, **provenance(checkpoint=chosen.name)})
    with replacing(out / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def _rounded(figures: dict) -> dict:
    return json.loads(json.dumps(figures), parse_float=lambda number: round(float(number), 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/demo-model"))
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER)
    args = parser.parse_args()
    release(args.checkpoints, args.out)


if __name__ == "__main__":
    main()
