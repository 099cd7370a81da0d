"""What pip installs is whole: recipes and templates travel with the packages."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def test_a_wheel_runs_the_digits_recipe_from_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=TOP, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in names:
            archive.extract(name, site)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "configs/")) for name in names)

    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.cli"]
    quick = ["simclr.max_steps=2", "tuned_*.max_steps=2", "probe*.label_fractions=[]", "probe*.subsets=[]"]
    recipe = ["run", "configs/digits.yaml", *(word for one in quick for word in ("--set", one))]
    finished = subprocess.run(
        [*command, *recipe], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    page = Path(finished.stdout.strip().splitlines()[-1].split("  ")[-1])
    assert (elsewhere / page).is_file()
    where = subprocess.run(
        [sys.executable, "-c", "import pipeline, stages; print(pipeline.__file__, stages.__file__)"],
        cwd=elsewhere, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.count(str(site)) == 2, "the wheel was tried, not the checkout"
