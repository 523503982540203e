"""A user's own model, by the module and the name of what makes it: "my_model:Own"."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from syncdpo.models.members import check_members
from syncdpo.versions import WrongVersions, checked_versions

NAME = re.compile(r"(?P<module>[^:]+\.py|[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<maker>[^\W\d]\w*)")
# What training says of every model; one that does not take it is not told of these values.
UNLESS_TAKEN = {"sigma": "separate", "allow_distilled": False}


def is_own(name: str) -> bool:
    """Whether a model's name is of the form module:Class, or names a file of Python."""
    return bool(NAME.fullmatch(name) or name.endswith(".py")) and not Path(name).is_dir()


def load_own(name: str, options: dict[str, Any]) -> Any:
    """What the class, or function, of that name makes of `options`, checked by `check_members`.

    A module is looked for where Python looks, the working folder included; folder/my_model.py is a
    file, beside which its own imports are found, too. Torch's random numbers begin with seed 0
    while it runs, so that weights drawn by it are the same in every process and in a resumed run.

    Raises ValueError where there is no such module or class, it cannot be imported, does not take
    an option, needs one that it was not given, or makes what lacks a part of the protocol.
    """
    maker = _maker(name)
    given = _given(name, maker, options)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        model = maker(**given)
    check_members(model)
    return model


def _given(name: str, maker: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """Of the options those that the maker is to be told. Raises ValueError where it is not so."""
    signature = inspect.signature(maker)
    kinds = {parameter: p.kind for parameter, p in signature.parameters.items()}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [parameter for parameter, kind in kinds.items() if kind in by_name]
    given = dict(options)
    if inspect.Parameter.VAR_KEYWORD not in kinds.values():
        for option, value in UNLESS_TAKEN.items():
            if option not in taken and given.get(option) == value:
                del given[option]
        if unknown := [option for option in given if option not in taken]:
            raise ValueError(
                f"{', '.join(unknown)}: expected options that {name} takes "
                f"({', '.join(taken) or 'none'}), got {given[unknown[0]]!r}"
            )
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ValueError(
            f"model: {name} needs more than it was given ({error}); name a function that gives it "
            f"that, as def large(): return {maker.__name__}(…)"
        ) from error
    return given


def _maker(name: str) -> Callable:
    found = NAME.fullmatch(name)
    if not found:
        raise ValueError(f"model: expected {name}:Class, the class in that file, got {name!r}")
    module = _module(name, found["module"])
    maker = getattr(module, found["maker"], None)
    if maker is None:
        raise ValueError(f"model: {found['module']} has no {found['maker']}, got {name!r}")
    if not callable(maker):
        raise ValueError(
            f"model: expected a class, or a function that returns a model, got {name!r}, which is "
            f"{type(maker).__name__}"
        )
    return maker


def _module(name: str, module: str) -> ModuleType:
    """Imported once, as Python does. Raises ValueError for whatever keeps it from that."""
    load = _from_file if module.endswith(".py") else _from_path
    if load is _from_file and not Path(module).is_file():
        raise ValueError(f"model: expected a file {module}, got none there ({name})")
    try:
        with checked_versions():
            return load(module)
    except WrongVersions:
        raise
    except Exception as error:  # whatever a stranger's module does
        parents = (module[: match.start()] for match in re.finditer(r"\.|$", module))
        if isinstance(error, ModuleNotFoundError) and error.name in parents:
            raise ValueError(
                f"model: expected a module {module}, found in {Path.cwd()} or installed, got none "
                f"({name}); a file elsewhere is named folder/{module.rpartition('.')[2]}.py:…"
            ) from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"model: {module} cannot be imported: {type(error).__name__}: {error} "
            f"({Path(last.filename).name}, line {last.lineno})"
        ) from error


def _from_path(module: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    importlib.invalidate_caches()
    return importlib.import_module(module)


def _from_file(file: str) -> ModuleType:
    path = Path(file).resolve()
    # Two files of one name are two modules.
    name = f"{path.stem}_{hashlib.blake2b(bytes(path), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that nothing of there hides what was found
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
