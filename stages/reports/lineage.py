"""The way from images to the report: a table, and the coordinates of its drawing."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from stages.reports.artifacts import Artifact, Lineage

DIGITS = 10
"""Digits of a digest that the page shows; REFs need at least 8."""
NODE_WIDTH, NODE_HEIGHT, LINE_WIDTH = 116, 46, 8
GAP_X, GAP_Y = 8, 30
MOST_NODES = 24
"""Above this many, artifacts that one stage made of the same things are drawn as one node."""
MOST_ALIKE = 2
"""So many of them still stand side by side."""


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Groups of settings as one, by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= (
            {f"{name}.{key}": item for key, item in flatten(value).items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def lineage_rows(lineage: Lineage) -> list[dict[str, Any]]:
    """One row an artifact, sources first: names, digests and settings as plain data."""
    return [
        {
            "stage": artifact.stage,
            "step": artifact.step,
            "digest": artifact.digest,
            "version": artifact.version,
            "seed": artifact.seed,
            "settings": artifact.settings,
            "inputs": artifact.inputs,
            "made_of": [_source_name(lineage, digest) for digests in artifact.inputs.values() for digest in digests],
        }
        for artifact in lineage.artifacts
    ]


def drawing(lineage: Lineage, page: str) -> dict[str, Any]:
    """A drawing from top to bottom: what an artifact was made of stands above it, `page` at the foot.

    Returns:
        {"width", "height", "nodes": [{"x", "y", "stage", "step", "digest", "title", "steps"}], "edges": [path data]};
        x is a node's middle, y its top, `steps` how many artifacts it stands for.
    """
    groups, sources = _group(lineage)
    read = {number for numbers in sources for number in numbers}
    sources.append([number for number in range(len(groups)) if number not in read])
    depths = _depths(sources)
    hops = _hops(sources, depths)
    places, width = _places(depths, hops)
    foot = {"stage": "report", "step": page, "digest": "this page", "title": page, "steps": 1}
    cards = [*map(_node, groups), foot]
    nodes = [{"x": x, "y": y} | cards[spot[0]] for spot, (x, y) in places.items() if spot[1] == depths[spot[0]]]
    edges = [_curve(places[above], places[below]) for above, below in hops]
    edges += [f"M{x:.1f} {y:.1f}v{NODE_HEIGHT}" for spot, (x, y) in places.items() if spot[1] != depths[spot[0]]]
    return {"width": width, "height": (max(depths) + 1) * (NODE_HEIGHT + GAP_Y) - GAP_Y, "nodes": nodes, "edges": edges}


def _group(lineage: Lineage) -> tuple[list[list[Artifact]], list[list[int]]]:
    """The nodes of the drawing with the artifacts that they stand for, and for each the nodes that it was made of.

    In a large drawing artifacts are one node if one stage made them of the same nodes: eighteen fine-tunings of one
    encoder, their features and their probes are three. Sources come before what was made of them.
    """
    levels: dict[str, int] = {}
    for artifact in lineage.artifacts:
        levels[artifact.digest] = 1 + max((levels[source.digest] for source in lineage.inputs(artifact)), default=-1)
    node_of: dict[str, int] = {}
    nodes: list[list[Artifact]] = []
    sources: list[list[int]] = []
    for level in range(max(levels.values()) + 1):
        alike: dict[Any, list[Artifact]] = {}
        for artifact in lineage.artifacts:
            if levels[artifact.digest] == level:
                made_of = sorted({node_of[source.digest] for source in lineage.inputs(artifact)})
                alike.setdefault((artifact.stage, *made_of), []).append(artifact)
        for (_, *made_of), members in alike.items():
            joined = len(levels) > MOST_NODES and len(members) > MOST_ALIKE
            for part in [members] if joined else [[one] for one in members]:
                node_of |= dict.fromkeys((one.digest for one in part), len(nodes))
                nodes.append(part)
                sources.append([*made_of])
    return nodes, sources


Spot = tuple[int, int]
"""(node, layer): the node itself in its own layer, its line on the way down in a later one."""


def _depths(sources: Sequence[Sequence[int]]) -> list[int]:
    """The layer of each node, as near as can be to what reads it; so steps of one kind stand in one row."""
    above_foot = [0] * len(sources)
    for node in reversed(range(len(sources))):
        for source in sources[node]:
            above_foot[source] = max(above_foot[source], above_foot[node] + 1)
    return [max(above_foot) - height for height in above_foot]


def _hops(sources: Sequence[Sequence[int]], depths: Sequence[int]) -> list[tuple[Spot, Spot]]:
    """Every line, cut where it passes a layer; lines from one node run together until they have to part."""
    hops = {}
    for node, below in enumerate(sources):
        for source in below:
            way = [(source, layer) for layer in range(depths[source], depths[node])] + [(node, depths[node])]
            hops |= dict.fromkeys(pairwise(way))
    return list(hops)


def _places(depths: Sequence[int], hops: Sequence[tuple[Spot, Spot]]) -> tuple[dict[Spot, tuple[float, float]], float]:
    """Middle and top of every spot, and the width of all: in a layer by the mean place of what leads there."""
    spots = dict.fromkeys([(node, depth) for node, depth in enumerate(depths)] + [spot for hop in hops for spot in hop])
    layers = [[spot for spot in spots if spot[1] == depth] for depth in range(max(depths) + 1)]
    widths = {spot: NODE_WIDTH if spot[1] == depths[spot[0]] else LINE_WIDTH for spot in spots}
    totals = [sum(widths[spot] + GAP_X for spot in layer) - GAP_X for layer in layers]
    places: dict[Spot, tuple[float, float]] = {}
    for depth, (layer, total) in enumerate(zip(layers, totals, strict=True)):
        means = {}
        for spot in layer:
            above = [places[upper][0] for upper, lower in hops if lower == spot]
            means[spot] = sum(above) / len(above) if above else 0.0
        left = (max(totals) - total) / 2
        for spot in sorted(layer, key=lambda spot: means[spot]):
            places[spot] = (left + widths[spot] / 2, depth * (NODE_HEIGHT + GAP_Y))
            left += widths[spot] + GAP_X
    return places, max(totals)


def _curve(above: tuple[float, float], below: tuple[float, float]) -> str:
    """From the foot of one spot to the head of another in the next layer."""
    (x1, top), (x2, y2) = above, below
    y1, bend = top + NODE_HEIGHT, GAP_Y / 2
    return f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"


def _node(members: Sequence[Artifact]) -> dict[str, Any]:
    first = members[0]
    steps = ", ".join(artifact.step for artifact in members)
    card = {"stage": first.stage, "title": f"{steps} ({first.stage})", "steps": len(members)}
    if len(members) == 1:
        digest = first.digest[:DIGITS]
        return card | {"step": first.step, "digest": digest, "title": f"{card['title']} {digest}"}
    return card | {"step": f"{len(members)} \N{MULTIPLICATION SIGN} {first.stage}", "digest": f"{first.step}, ..."}


def _source_name(lineage: Lineage, digest: str) -> str:
    for artifact in lineage.artifacts:
        if artifact.digest == digest:
            return artifact.step
    return f"files {digest.removeprefix('foreign:')[:DIGITS]}"
