"""Which node an applicant is given, over HTTP."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from domi_fast import Node
from tests.gateway.nodes import gateway
from tests.gateway.zones import zone
from tests.support import until


async def get(gate: Any, path: str, **headers: str) -> tuple[int, Any, Any]:
    url = f"http://127.0.0.1:{gate.http_port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.json(content_type=None), answer.headers


async def test_the_zone_with_most_room() -> None:
    async with gateway(http_port=0) as gate, zone(gate) as one, zone(gate) as two:
        one.publish(memory=0.4)
        two.publish(memory=0.3)
        await until(lambda: [s.memory for s in gate.zones.of("room")] == [0.3, 0.4])
        status, found, _ = await get(gate, "/place/room")
        assert (status, found) == (
            200,
            {
                "service": "room",
                "node": str(two.id),
                "machine": two.node.id,
                "address": f"127.0.0.1:{two.node.port}",
                "version": "0",
                "memory": 0.3,
            },
        )


async def test_all_zones_are_full() -> None:
    async with gateway(http_port=0) as gate, zone(gate) as one, zone(gate) as two:
        one.publish(memory=0.95, open=False, full=True)
        two.publish(memory=0.91, open=False, full=True)
        await until(lambda: gate.zones.is_full("room"))
        status, found, _ = await get(gate, "/place/room")
        assert status == 503
        assert found == {
            "error": "the zones of service 'room' (2) use more than they may of their memory: "
            "try again later"
        }


async def test_zones_that_retire() -> None:
    async with gateway(http_port=0) as gate, zone(gate) as one:
        one.publish(open=False)
        await until(lambda: gate.zones.place("room") is None)
        status, found, _ = await get(gate, "/place/room")
        assert (status, "take no new groups" in found["error"]) == (503, True)


async def test_nobody_serves_that() -> None:
    async with gateway(http_port=0) as gate:
        status, found, _ = await get(gate, "/place/nothing")
        assert (status, found) == (404, {"error": "no node of service 'nothing' is there"})


async def test_a_service_without_zones_is_the_node_with_most_memory() -> None:
    async with gateway(http_port=0) as gate:
        url = gate.node.config.registry
        async with Node("shop", registry=url, version="1.2") as shop:
            await gate.node.wait_peers(1)
            await until(lambda: gate.node.peers[shop.id].memory is not None)
            status, found, _ = await get(gate, "/place/shop")
            assert status == 200
            assert found["address"] == f"127.0.0.1:{shop.port}"
            assert (found["machine"], found["node"]) == (shop.id, str(shop.id))
            assert found["version"] == "1.2"
            assert 0 < found["memory"] < 1
            await shop.pause()
            status, _, _ = await get(gate, "/place/shop")
            assert status == 404
        status, found, _ = await get(gate, "/place/gate")
        assert (status, found["machine"]) == (200, gate.node.id)


@pytest.mark.parametrize(
    ("origin", "allowed"), [("https://chat.example", True), ("https://evil.example", False)]
)
async def test_a_page_elsewhere_may_read_it(origin: str, allowed: bool) -> None:
    async with gateway(http_port=0, origins=["https://chat.example"]) as gate:
        _, _, headers = await get(gate, "/place/gate", Origin=origin)
        assert headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
