"""Which recipe a user means: one of ours by name, or a function of a file of their own."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path, PurePath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from genembed.errors import ConfigurationError, GenembedError

if TYPE_CHECKING:
    from genembed.train.pairs import DataFile
    from genembed.train.recipe import Recipe

_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<function>\w+))?")
_DEFAULT = "recipe"


def chosen_recipe(given: str, files: Sequence[DataFile]) -> Recipe:
    """Return the recipe of a name, or of a file `path.py` or `path.py:function`, whose code is run.

    Args:
        given: Name or file. Of a file without a function, the function `recipe` is taken, or the only public one annotated to return
            a `Recipe`.
        files: What the recipe is trained on; a function of a user's file is called without arguments if there are none.

    Raises:
        ConfigurationError: If there is no such recipe, the file fails, or files are needed or not wanted.
    """
    match = _FILE.fullmatch(given)
    if match is not None:
        path = Path(match["path"]).expanduser()
        name, function = _function(path, match["function"])
        return _called(function, files, path, name)
    from genembed.train.recipes import named_recipe

    maker = named_recipe(given)
    if not files:
        raise ConfigurationError(f"recipe {given!r} brings no training pairs; name files of them: --data pairs.jsonl.")
    return maker(*files)


def data_file(given: str) -> DataFile:
    """Read `PATH` or `PATH=WEIGHT`; a file whose own name ends in `=...` is taken as it is.

    Raises:
        ConfigurationError: If the weight is not a positive number.
    """
    from genembed.train.pairs import DataFile

    path, equals, weight = given.rpartition("=")
    if not equals or Path(given).exists() or len(PurePath(weight).parts) > 1:
        return DataFile(path=given)
    try:
        return DataFile(path=path, weight=float(weight))
    except ConfigurationError as error:
        raise ConfigurationError(f"--data {given}: {error}") from error
    except ValueError:
        raise ConfigurationError(f"--data {given}: the weight {weight!r} is not a number, and there is no file of this name.") from None


def _function(path: Path, name: str | None) -> tuple[str, Callable[..., Any]]:
    """Return a function of a file after its name."""
    module = _run(path)
    own = {key: value for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__}
    recipes = [key for key, value in own.items() if not key.startswith("_") and _makes_recipe(value)]
    if name is None:
        name = _DEFAULT if _DEFAULT in own else recipes[0] if len(recipes) == 1 else None
    if name is None or not callable(getattr(module, name, None)):
        known = f"one of {', '.join(recipes)}" if recipes else f"def {_DEFAULT}(*files: DataFile) -> Recipe, which it does not have yet"
        reason = "does not say which recipe" if name is None else f"has no function {name!r}"
        raise ConfigurationError(f"{path} {reason}; use {path}:NAME with {known}.")
    return name, getattr(module, name)


def _run(path: Path) -> ModuleType:
    """Run a user's file as a module of its own."""
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such file; a recipe is one of ours by name, or a function of a file: my_recipes.py:my_run.")
    spec = spec_from_file_location(f"genembed_recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses of the file look themselves up there
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # a recipe may build on the file beside it; last, so that nothing installed is hidden
    try:
        spec.loader.exec_module(module)
    except GenembedError:
        raise
    except Exception as error:
        raise _fault(path, error) from error
    return module


def _called(function: Callable[..., Any], files: Sequence[DataFile], path: Path, name: str) -> Recipe:
    from genembed.train.recipe import Recipe

    try:
        inspect.signature(function).bind(*files)
    except TypeError as error:
        wanted = f"does not take {len(files)} files" if files else "needs arguments"
        way_out = "leave --data out" if files else "give it files of training pairs: --data pairs.jsonl"
        raise ConfigurationError(f"{path}:{name} {wanted} ({error}); {way_out}.") from error
    try:
        recipe = function(*files)
    except GenembedError:
        raise
    except Exception as error:
        raise _fault(path, error) from error
    if not isinstance(recipe, Recipe):
        raise ConfigurationError(f"{path}:{name} returned {recipe!r:.80}; a recipe function returns a genembed.train.recipe.Recipe.")
    return recipe


def _makes_recipe(function: Callable[..., Any]) -> bool:
    """Whether a function is annotated to return a recipe; the annotation may be a string."""
    annotation = inspect.get_annotations(function).get("return")
    name = annotation.strip("'\"") if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return name.rpartition(".")[2] == "Recipe"


def _fault(path: Path, error: Exception) -> ConfigurationError:
    """Say on one line what went wrong in a user's file, and in which line of it."""
    line, step = getattr(error, "lineno", None), error.__traceback__
    while step is not None:
        if Path(step.tb_frame.f_code.co_filename) == path.absolute():
            line = step.tb_lineno
        step = step.tb_next
    where = path if line is None else f"{path}, line {line}"
    return ConfigurationError(f"{where}: {type(error).__name__}: {getattr(error, 'msg', None) or error}")
