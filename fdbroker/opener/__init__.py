"""The root helper: accepts, identifies, decides, opens and sends; it alone grants. It never reads a client's socket.

| module | what it does |
|---|---|
| request | the stages of a request, in order |
| accept | connections in, and what happens at EMFILE |
| identify | the kernel's word on who asks |
| authorize | policy and limits |
| open | find, judge and open a node |
| ask | what only the namespaces worker can open |
| audit | one record before a descriptor leaves |
| send | descriptor and reply in one message |
| close | closing, which may sleep |
| listing | what a subject may open now |
| service | the loop and the links |

An attacker controls the paths that arrive through the inbox; a taken-over inbox every byte of its link.
"""
