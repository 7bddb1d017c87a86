"""Talking to servers that the configuration names, and to no others.

    server_url.py   which URLs a server may have, and which token goes there
    addresses.py    which addresses a server may have
    client.py       one exchange with a server, tried again where a failure may pass
    client_transport.py  under somebody else's HTTP client: what it may send and be sent
    hub.py          a model's folder on the Hugging Face hub: which of its files go
    event_loop.py   the one event loop of async rewards and requests

What is said to a reward server stands in `rewards/http.py`, to a vLLM server in
`sampling/vllm_client.py`.
"""
