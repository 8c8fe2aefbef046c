"""The installed package ``etcd3``, imported with whatever protobuf there is.

etcd3 0.12 is the last release, and its generated modules cannot be imported with protobuf 4 or
later. What they were generated from stands in them, as serialized descriptors: the messages are
made of those, in a descriptor pool of their own, where nobody else's ``kv.proto`` is in the way,
and stand in for ``etcd3.etcdrpc`` when the rest of the package, unmodified, is imported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import threading
import types
from pathlib import Path
from typing import Any, Final

from ..errors import RegistryError

_MODULES: Final = ("kv_pb2", "auth_pb2", "rpc_pb2")  # each after those that it imports
_lock = threading.Lock()


def load_etcd3() -> Any:
    """The module ``etcd3``, whose ``etcdrpc`` has the messages and stubs of etcd's API.

    One that the program has imported by itself is taken as it is.

    :raises RegistryError: it is not installed, or something that it needs is not.
    """
    with _lock:
        if sys.modules.get("etcd3") is not None:
            return sys.modules["etcd3"]
        try:
            return _load()
        except (ImportError, OSError, LookupError) as error:
            raise RegistryError(
                f"the etcd registry needs the extra [etcd], which cannot be imported ({error}): "
                "pip install 'domi-fast[etcd]'"
            ) from error


def _load() -> Any:
    spec = importlib.util.find_spec("etcd3")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("no module named 'etcd3'")
    folder = Path(spec.submodule_search_locations[0]) / "etcdrpc"
    made = _messages(folder)
    try:
        sys.modules.update(made)
        etcd3 = importlib.import_module("etcd3")
        stubs = importlib.import_module("etcd3.etcdrpc.rpc_pb2_grpc")
    except BaseException:
        for name in [name for name in sys.modules if name.partition(".")[0] == "etcd3"]:
            del sys.modules[name]
        raise
    _give(made["etcd3.etcdrpc"], stubs)
    return etcd3


def _messages(folder: Path) -> dict[str, types.ModuleType]:
    """``etcd3.etcdrpc`` and its modules of messages, by their full names."""
    from google.protobuf import descriptor_pb2, descriptor_pool
    from google.protobuf.internal import enum_type_wrapper

    pool = descriptor_pool.DescriptorPool()
    package = types.ModuleType("etcd3.etcdrpc")
    package.__path__ = [str(folder)]
    made = {package.__name__: package}
    for name in _MODULES:
        serialized = _serialized_descriptor(folder / f"{name}.py")
        pool.AddSerializedFile(serialized)
        file = pool.FindFileByName(descriptor_pb2.FileDescriptorProto.FromString(serialized).name)
        module = types.ModuleType(f"etcd3.etcdrpc.{name}")
        for title, message in file.message_types_by_name.items():
            setattr(module, title, _message_class(pool, message))
        for title, enum in file.enum_types_by_name.items():
            setattr(module, title, enum_type_wrapper.EnumTypeWrapper(enum))
            for value in enum.values:
                setattr(module, value.name, value.number)
        setattr(package, name, module)
        made[module.__name__] = module
    _give(package, made["etcd3.etcdrpc.rpc_pb2"])
    return made


def _message_class(pool: Any, descriptor: Any) -> Any:
    from google.protobuf import message_factory

    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(pool).GetPrototype(descriptor)  # before protobuf 4.22


def _serialized_descriptor(path: Path) -> bytes:
    """What a generated module hands to protobuf, without running it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    return part.value.encode("latin-1")
    raise LookupError(f"{path.name} has no serialized descriptor: is this etcd3 0.12?")


def _give(package: types.ModuleType, module: types.ModuleType) -> None:
    """What ``from module import *`` would give the package."""
    for name, value in vars(module).items():
        if not name.startswith("_"):
            setattr(package, name, value)
