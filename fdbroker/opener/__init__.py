"""The root helper: accepts, identifies, decides, opens and sends; it alone grants. It decodes no client's bytes.

| module | what it does |
|---|---|
| request | the stages of a request, in order |
| door | who is let in, and what those hear who are not |
| accept | connections in, and what happens at EMFILE |
| identify | the kernel's word on who asks |
| authorize | policy and limits |
| open | find, judge and open a node |
| ask | what only the namespaces worker can open |
| audit | one record before a descriptor leaves |
| send | descriptor and reply in one message |
| close | closing, which may sleep |
| views | what the policy says about each subject, and what was decided by it |
| service | the loop and the links |

The bytes of a connection that is turned away are thrown away. An attacker controls the paths that arrive through the
inbox; a taken-over inbox every byte of its link.
"""
