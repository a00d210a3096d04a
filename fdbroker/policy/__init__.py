"""The admin's policy: from YAML to a decision.

| module | what it does | runs in |
|---|---|---|
| files | which files, and whether only root could have written them | launcher, command line |
| globs | globs against globs: overlap with dangerous names, cover by a deny rule | launcher, command line |
| load | YAML text to a tree with positions, judged by schema | launcher, command line |
| compile | names to ids, globs checked, one flat Policy | launcher, command line |
| recipients | for whom messages are stored, by the group database | launcher, command line |
| compiled | the Policy itself, to bytes and back | launcher, opener, keeper, inbox, command line |
| decide | Policy, subject and path to allow or deny | opener, keeper, inbox, launcher, command line |
| fit | whether a node fits a rule; the dangerous names, numbers and classes | opener, keeper, launcher, command line |
| explain | why, what came near, and the smallest change | command line |

Pure: no socket, and nothing is opened but the policy files, by files.
"""
