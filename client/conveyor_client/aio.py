"""The asynchronous client.

async with aio.Client("localhost:50051") as client, client.session("letters") as session:
    output = await session.step(token)
"""

from conveyor_client._client import Client
from conveyor_client._generation import Generation
from conveyor_client._session import Session

__all__ = ["Client", "Generation", "Session"]
