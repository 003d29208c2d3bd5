"""docs/continual.md: its config is one, and the defaults it names are those that hold."""

from __future__ import annotations

import re
from pathlib import Path

from mergebench.parameters import parameters_of
from mergebench.systems.mos.config import Config, load_config

PAGE = (Path(__file__).parents[2] / "docs" / "continual.md").read_text(encoding="utf-8")


def test_the_config_and_every_default(tmp_path: Path) -> None:
    text = re.search(r"```yaml\n(backbone:.*?)```", PAGE, re.DOTALL).group(1)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "cache/digits").mkdir(parents=True)
    for name in ("train", "test"):
        (tmp_path / f"cache/digits/{name}.jsonl").touch()
    config = load_config(tmp_path / "config.yaml")
    assert (config.tasks, config.kind) == (5, "image")

    rest = PAGE[PAGE.index(text) + len(text) :]
    paragraph = rest[rest.index("More keys") : rest.index("\n\n", rest.index("More keys"))]
    named, parameters = dict(re.findall(r"`(\w+): ([\w.-]+)[^`]*`", paragraph)), parameters_of(Config)
    for key, value in named.items():
        default = parameters[key].default
        found = config.pools if key == "pooling" else default
        assert str(found) == value or float(value) == found
    in_text = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    assert in_text | named.keys() | {"text"} == parameters.keys()
