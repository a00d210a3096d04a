"""The namespaces worker: opens and makes for the opener what a process confined like the opener cannot.

| module | what it does |
|---|---|
| service | requests in, a child for each question of them, one answer or its failure out |
| queue | whose question is next: of each owner one at a time, in turn |
| answer | what a child does: find and judge a namespace, make a new one, a socket inside one |
| connect | a new net namespace on the admin's bridge |
| living | which of the namespaces that were made still are |

It runs only if the policy has rules for namespaces or sockets. It reads from the opener alone; a client controls which
name or pid is asked for, and, while a namespace is made in its user namespace, whether the child that does it runs on.
"""
