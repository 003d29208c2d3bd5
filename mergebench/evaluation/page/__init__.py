"""The report page: the merge, evaluation or search in a directory as `report.html`; several beside each other.

    write(directory)    write_figures(directory, folder)    write([directory, directory], file)

The page is one self-contained file: no script, no font, no request. A section appears if it has something to show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.errors import RecipeError
from mergebench.evaluation.page.figures import Drawn, Figure
from mergebench.evaluation.page.parts import Gallery, Part, Section, Table, Text
from mergebench.evaluation.page.sources import Plots, Sources, no_plots, read

if TYPE_CHECKING:
    from mergebench.recipe import Recipe

FILE, OF_SEVERAL = "report.html", "side-by-side.html"
Writer = Callable[[Sources], Iterator[Section]]
Place = str | Path | Sequence[str | Path]


def write(directory: Place, out: str | Path | None = None, plots: Plots = no_plots) -> Path:
    """Write the page, by default as `report.html` in the directory; returns its path.

    directory: or several, whose results stand beside each other, by default in `side-by-side.html` here. plots: what
    draws a result that no recipe made; else the page has the pictures of its card.

    Raises `RecipeError` if there is nothing to show, or no task that all have; `RunError` if a document is damaged or
    the disk is full.
    """
    from mergebench.checkpoint.files import write_atomically, write_error

    sources = read_all(directory, plots)
    target = Path(out or (OF_SEVERAL if sources.runs else sources.directory / FILE))
    text = render(sources).encode("utf-8", "replace").decode()  # JSON may hold lone surrogates
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(target, error) from None
    write_atomically(target, text)
    return target


def read_all(directory: Place, plots: Plots = no_plots) -> Sources:
    """What there is to show of a directory, or of several beside each other; raises as `write`."""
    from mergebench.evaluation.page import side_by_side

    places = [directory] if isinstance(directory, str | Path) else directory
    found = [read(Path(place), plots) for place in places]
    return found[0] if len(found) == 1 else side_by_side.join(found)


def write_figures(directory: Place, out: str | Path, plots: Plots = no_plots) -> list[Path]:
    """Write every plot of the page into the folder `out`, as NAME.pdf and NAME.png; returns the files.

    Raises as `write`.
    """
    from mergebench.checkpoint.files import write_error

    folder, files = Path(out), list[Path]()

    def save(figures: Sequence[Figure]) -> Sequence[Drawn]:
        for figure in figures:
            files.extend(figure.save(folder))
        return []

    sources = read_all(directory, plots)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from None
    _sections(sources, save)
    return files


def written(directory: Place, form: str, plots: Plots = no_plots) -> str:
    """The tables of the page, without those to be opened, as markdown, latex or csv; raises as `write`."""
    from mergebench.evaluation.page import cards, searched, side_by_side
    from mergebench.evaluation.tables.results import sheets
    from mergebench.evaluation.tables.sheet import written as as_text

    sources = read_all(directory, plots)
    if sources.runs:
        return as_text(side_by_side.tables(sources), form)
    writers = [searched.sections] * (sources.search is not None) + [cards.sections]
    parts = [part for writer in writers for section in writer(sources) for part in section.parts]
    found = [part.sheet for part in parts if isinstance(part, Table)]
    found += [] if sources.results is None else sheets(sources.results)
    if not found:
        raise RecipeError(f"{sources.directory}: it has no table", "the page shows what there is: leave out --format")
    return as_text(found, form)


def document(directory: Sequence[str | Path]) -> dict[str, Any]:
    """Several results beside each other, ready for JSON; raises as `write`."""
    from mergebench.evaluation.page import side_by_side

    return side_by_side.to_dict(side_by_side.join([read(Path(place)) for place in directory]))


def attempt(directory: Path) -> None:
    """Write the page if possible: the results are on disk already, so its failure must not end the run."""
    with suppress(Exception):
        write(directory)


def look_at_merge(recipe: Recipe, directory: Path, provenance: Mapping[str, Any]) -> None:
    """Write the statistics of a merge beside it, if it has any; failures are ignored, because only the page needs
    them."""
    from mergebench.evaluation.page.profile import profile
    from mergebench.recipe.resolve import resolve

    with suppress(Exception):  # inputs that are gone, answers of another version
        found = profile(resolve(recipe), provenance["answers"])
        if found is not None:
            found.save(directory)


def render(sources: Sources) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from mergebench import __version__
    from mergebench.checkpoint.drawing import COLOURS
    from mergebench.evaluation.page import figures, head

    folder = Path(__file__).parent
    template = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    ).get_template("page.html")
    return template.render(
        title=head.title(sources),
        what=head.what(sources),
        findings=head.findings(sources),
        sections=_sections(sources, figures.drawn),
        colours=[*COLOURS.items()],
        style=(folder / "page.css").read_text(encoding="utf-8"),
        version=__version__,
    )


def _sections(sources: Sources, use: Callable[[Sequence[Figure]], Sequence[Drawn]]) -> list[Section]:
    """What there is to show, with plots as `use` gives them, each under a name of its own. A section that fails says
    so; the others are unaffected."""
    from mergebench.evaluation.page import cards, edited, flipped, layers, origin, scores, searched, side_by_side

    writers: list[Writer] = [
        scores.sections, searched.sections, flipped.sections, edited.sections, layers.sections, cards.sections,
        origin.sections,
    ]  # fmt: skip
    if sources.runs:
        writers = [side_by_side.sections, scores.sections, flipped.sections]
    found: list[Section] = []
    names: Counter[str] = Counter()

    def shown(part: Part) -> Part:
        if not isinstance(part, Gallery):
            return part
        named = []
        for figure in part.figures:
            names[figure.name] += 1
            again = names[figure.name]
            named.append(figure if again == 1 else figure._replace(name=f"{figure.name}-again-{again}"))
        return part._replace(drawn=use(named))

    for writer in writers:
        try:
            for section in writer(sources):
                found.append(section._replace(parts=[shown(part) for part in section.parts]))
        except Exception as error:
            name = writer.__module__.rpartition(".")[2]
            found.append(Section(f"Not drawn: {name}", [Text(f"{type(error).__name__}: {error}")]))
    return found
