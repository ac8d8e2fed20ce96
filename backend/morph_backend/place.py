"""Which of its model's serving processes this one is: Triton starts one for each instance in `instance_group`."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from morph_runtime.engine.orphan import parent_of
from morph_runtime.errors import ConfigError

MOST = 32


@dataclass(frozen=True)
class Place:
    """Number `index` of `count`; number 0 owns the engine, the others are its branches."""

    index: int
    count: int
    server: int
    """Process id of the server, whose child each of them is."""
    model: tuple[str, str]
    """Name and version."""

    @staticmethod
    def of(args: Mapping[str, str], model_config: Mapping[str, Any], server: int) -> Place:
        """Read what Triton says of the instance.

        Raises:
            ConfigError: there are several and they cannot be told apart, or too many.
        """
        groups = model_config.get("instance_group") or [{}]
        count = sum(int(group.get("count", 1)) * max(1, len(group.get("gpus") or ())) for group in groups)
        model = (args["model_name"], args["model_version"])
        if count <= 1:
            return Place(0, 1, server, model)
        number = re.fullmatch(re.escape(model[0]) + r"_0_(\d+)", args.get("model_instance_name", ""))
        if len(groups) > 1 or number is None:
            raise ConfigError("instance_group must be one group of KIND_MODEL to have more than one instance.")
        if count > MOST:
            raise ConfigError(f"instance_group: count must be at most {MOST}, but is {count}.")
        return Place(int(number[1]), count, server, model)

    def fellow(self, connection: socket.socket) -> int:
        """The process id of the other end of a Unix socket; 0 if it is not an instance of this server's, for a name
        without a file may be taken and called by any user of the machine."""
        size = struct.calcsize("3i")
        pid, uid, _group = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return int(pid) if uid == os.getuid() and parent_of(pid) == self.server else 0

    @property
    def address(self) -> str:
        """Where the owner is to be met: a name without a file, of this server alone.

        Containers that share a network share such names, but not their process ids' namespace.
        """
        known = "/".join((os.readlink("/proc/self/ns/pid"), str(self.server), *self.model))
        return "\0morphserve-" + hashlib.blake2b(known.encode(), digest_size=16).hexdigest()
