"""Hostile recipes."""

from collections.abc import Callable
from pathlib import Path

from faults import hostile_files as files
from faults.corpus.inputs import Command, Hostile
from faults.world import World


def _recipe(text: str) -> Callable[[World], Command]:
    def bring(world: World) -> Command:
        world.write("evil.yaml", text.replace("CANARY", str(world.canary)))
        return ["run", "evil.yaml"]

    return bring


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
STEPS = 'name: evil\nsteps:\n  shards: {stage: shard, source: "folder:images"}\n'
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a call of os.system": (
        "steps: !!python/object/apply:os.system ['touch CANARY']\n",
        ("python/object/apply:os.system", "line 1"),
    ),
    "a call of subprocess": (
        "name: x\nsteps: !!python/object/apply:subprocess.Popen [['touch', 'CANARY']]\n",
        ("subprocess.Popen", "line 2"),
    ),
    "an object of Python": ("steps: !!python/object/new:os.system ['touch CANARY']\n", ("python/object/new", "line 1")),
    "a name of Python": ("name: !!python/name:os.system\nsteps: {}\n", ("python/name:os.system", "line 1")),
    "a module of Python": ("name: !!python/module:os\nsteps: {}\n", ("python/module:os", "line 1")),
    "a tag of its own": ("steps: !exec 'touch CANARY'\n", ("!exec", "line 1")),
    "a bomb of aliases": (f"{BOMB}steps: *a8\n", ("values", "line")),
    "an alias within itself": ("steps: &a {x: *a}\n", ("stands within what it means", "line 1")),
    "100,000 lists within one another": (f"steps: {'[' * 100_000}", ("nests more than", "line 1")),
    "a key twice": (f"{STEPS}steps: {{}}\n", ("key stands twice: steps",)),
    "an import path as stage": ("steps: {x: {stage: os.system}}\n", ("x.stage", "no stage 'os.system'")),
    "a file as stage": ("steps: {x: {stage: ../../evil.py}}\n", ("x.stage", "no stage")),
    "an import path as loss": (
        f"{STEPS}  x: {{stage: finetune, shards: shards, encoder: random, loss: {{name: torch.hub.load}}}}\n",
        ("x.loss.name", "torch.hub.load"),
    ),
    "an import path as optimiser": (
        f"{STEPS}  x: {{stage: pretrain, shards: shards, views: shards, optimiser: {{name: os.system}}}}\n",
        ("x.optimiser.name", "os.system"),
    ),
    "an import path as tracker": (
        f"{STEPS}  v: {{stage: augment, shards: shards}}\n"
        "  x: {stage: pretrain, shards: shards, views: v, trackers: ['os.system']}\n",
        ("x.trackers", "os.system"),
    ),
    "an import path as backbone": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: random, architecture: {{backbone: os.system}}}}\n",
        ("x: no backbone 'os.system'",),
    ),
    "a repository as backbone": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: random, "
        "architecture: {backbone: 'timm:hf_hub:e/x'}}\n",
        ("x: no backbone 'timm:hf_hub:e/x'",),
    ),
    "a folder as backbone": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: random, "
        "architecture: {backbone: 'timm:local-dir:/tmp'}}\n",
        ("x: no backbone 'timm:local-dir:/tmp'",),
    ),
    "a repository as encoder": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: 'timm:hf-hub:evil/x'}}\n",
        ("x", "timm:hf-hub:evil/x"),
    ),
    "weights as encoder": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: ../evil.pth}}\n",
        ("x.encoder", "../evil.pth"),
    ),
    "a name above": (STEPS.replace("evil", "../../evil"), ("name", "'../../evil'")),
    "a step with a name above": (STEPS.replace("  shards:", "  ../../x:"), ("../../x", "name of a step")),
    "an unknown field": (f"{STEPS}import: os\n", ("import", "name, seed and steps only")),
    "an unknown setting": (STEPS.replace("source", "command"), ("shards.command", "no such setting")),
}


def make_recipes() -> list[Hostile]:
    found = [Hostile(f"recipe: {name}", _recipe(text), told) for name, (text, told) in RECIPES.items()]

    def binary(name: str, make: Callable[[Path], bytes]) -> Callable[[World], Command]:
        def bring(world: World) -> Command:
            world.write(name, make(world.canary))
            return ["run", name]

        return bring

    tagged = "shards.labels=!!python/object/apply:os.system ['touch x']"
    return [
        *found,
        Hostile("recipe: a pickle", binary("evil.pkl", files.pickled), ("evil.pkl", "not a YAML file")),
        Hostile("recipe: a file of torch.save", binary("evil.pt", files.torch_saved), ("evil.pt", "not a YAML file")),
        Hostile(
            "recipe: a tag on the command line",
            lambda _: ["run", "toy.yaml", "--set", tagged],
            ("--set shards.labels",),
        ),
    ]
