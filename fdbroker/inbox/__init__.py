"""The unprivileged front: it alone reads what clients send, and it can do nothing but ask the opener in their name.

| module | what it does |
|---|---|
| decode | bytes to one request |
| dispatch | a request to an answer or a question to the opener |
| service | the loop, the clients, the links |

An attacker controls every byte that arrives from a client.
"""
