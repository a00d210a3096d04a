"""The unprivileged front: it alone reads what clients send, and it can do nothing but ask the opener in their name.

| module | what it does |
|---|---|
| decode | bytes to one request |
| dispatch | a request to an answer, a message, or a question to the opener |
| topics | messages: who may send and have them, and what waits for whom |
| store | the messages that are kept for who is not there |
| attached | the descriptors that come with messages |
| client | one connection: what came, and what is owed |
| service | the loop, the clients, the links |

An attacker controls every byte that arrives from a client.
"""
