"""Names of classes, files and groups that are HTML and script are text in a report, in a real browser."""

import csv
from pathlib import Path

from faults.browser import look_at, version
from faults.hostile_files import png
from faults.tally import Tally
from faults.world import make_world
from faults.zygote import Zygote

PAYLOAD = "document.title='pwned'"
CLASSES = [
    f"<img src=x onerror=\"{PAYLOAD}\">",
    f"<script>{PAYLOAD}</script>",
    f"</script><script>{PAYLOAD}</script>",
    f"</style></title></textarea><svg onload={PAYLOAD}>",
    f"\"><iframe srcdoc=\"<script>parent.{PAYLOAD}</script>\"></iframe>",
    f"' onmouseover='{PAYLOAD}' autofocus onfocus='{PAYLOAD}' x='",
    f"javascript:{PAYLOAD}",
    "<!-- & &amp; &lt; \" ' ` {{ 7 * 7 }} ${7 * 7} $x$ ]]>",
    "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe\N{POP DIRECTIONAL FORMATTING}\N{ZERO WIDTH SPACE}鳥",
    "\\u003cscript\\u003e\\x3cscript\\x3e",
]  # fmt: skip
FILES = [
    f"<img src=x onerror={PAYLOAD}>",
    f"<script>{PAYLOAD}",
    f"\"'><svg onload={PAYLOAD}>",
    "&lt;b&gt; & {{ 7 * 7 }}",
]
IMAGES_OF_CLASS = 8
RECIPE = """
name: names
steps:
  shards:   {stage: shard, source: "csv:table.csv", test_fraction: 0.25, workers: 1, columns: {group: who}}
  features: {stage: embed, shards: shards, encoder: pixels, image_size: 8, device: cpu}
  probe:    {stage: probe, features: features, label_fractions: [], subsets: [], bootstrap_samples: 100}
  found:    {stage: retrieve, features: features, bootstrap_samples: 100}
  report:   {stage: report, of: [probe, found], title: "TITLE"}
"""
TITLE = f"<script>{PAYLOAD}</script> report"


def test_names_are_text_in_a_browser(tmp_path: Path, zygote: Zygote, tally: Tally) -> None:
    world = make_world(tmp_path / "world")
    rows = []
    for number in range(len(CLASSES) * IMAGES_OF_CLASS):
        file = f"{FILES[number % len(FILES)]} {number}.png"
        world.write(f"pictures/{file}", png(number))
        rows.append([f"pictures/{file}", CLASSES[number // IMAGES_OF_CLASS], f"{CLASSES[0]} {number}"])
    with (world.here / "table.csv").open("w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([["path", "label", "who"], *rows])
    world.write("names.yaml", RECIPE.replace("TITLE", TITLE))
    code, said = zygote.run(["run", "names.yaml"], world.here, environment=world.environment())
    assert code == 0, said
    (page,) = (world.here / "artifacts" / "builds" / "report").rglob("report.html")

    seen = look_at(page, tmp_path)
    assert seen.title.strip().startswith(TITLE)
    names = [*CLASSES, *(name for name in FILES)]
    assert [name for name in names if name not in seen.text] == []
    assert seen.console == []
    assert not {tag for tag, _ in seen.elements} & {"iframe", "object", "embed", "base", "form"}
    assert sum(tag == "script" for tag, _ in seen.elements) == page.read_text().count("<script")
    for tag, attributes in seen.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")) or value == "data:,", (tag, attributes)

    # The same browser runs these names where they are not text: the test can fail.
    raw = world.write("raw.html", f"<title>raw</title>{CLASSES[0]}")
    assert look_at(raw, tmp_path).title == "pwned"
    tally.add("names-as-text", tried=len(names) + 1, held=len(names) + 1, note=version())
