"""Hosts inside one machine: network namespaces on a bridge, each with its own address and a link that can be cut.

Needs root and ``ip``. The machine itself stands on the bridge too, with the last address.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress

SUBNET = "198.51.100"  # set aside for documentation (RFC 5737), so it is nobody's
HOME_ADDRESS = f"{SUBNET}.254"


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "not root"
    if shutil.which("ip") is None:
        return "no ip command"
    name = f"zsr{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return made.stderr.strip()
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Network:
    """A bridge with hosts.

    Args:
        hosts: how many.
    """

    def __init__(self, hosts: int) -> None:
        self._prefix = f"z{os.getpid()}"
        self._hosts = range(1, hosts + 1)

    def up(self) -> None:
        """Make it.

        Raises:
            OSError: somebody uses the addresses or names.
        """
        switch = f"{self._prefix}s"
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", switch, "link", "set", "br0", "up")
            home = f"{self._prefix}h"
            _ip("link", "add", home, "type", "veth", "peer", "name", "home", "netns", switch)
            _ip("addr", "add", f"{HOME_ADDRESS}/24", "dev", home)
            _ip("link", "set", home, "up")
            self._plug("home")
            for host in self._hosts:
                space = self._space(host)
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
                # eth0 everywhere, so that one name tells gloo which way to go.
                _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", f"p{host}", "netns", switch)
                _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
                self._plug(f"p{host}")
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Remove all of it; links go with their namespaces."""
        with suppress(OSError):
            _ip("link", "del", f"{self._prefix}h")
        for space in [*map(self._space, self._hosts), f"{self._prefix}s"]:
            with suppress(OSError):
                _ip("netns", "del", space)

    def address(self, host: int) -> str:
        """A host's address."""
        return f"{SUBNET}.{host}"

    def command(self, host: int) -> list[str]:
        """What a command starts with so that it runs on a host."""
        return ["ip", "netns", "exec", self._space(host)]

    def cut(self, host: int) -> None:
        """Take a host off the network without a word: packets are lost, connections stay open."""
        _ip("-n", f"{self._prefix}s", "link", "set", f"p{host}", "down")

    def mend(self, host: int) -> None:
        """Put it back."""
        _ip("-n", f"{self._prefix}s", "link", "set", f"p{host}", "up")

    def _plug(self, port: str) -> None:
        _ip("-n", f"{self._prefix}s", "link", "set", port, "master", "br0")
        _ip("-n", f"{self._prefix}s", "link", "set", port, "up")

    def _space(self, host: int) -> str:
        return f"{self._prefix}n{host}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
