"""The service's main process: load, start, reload, stop. Root; it reads the policy, NSS and signals, no client.

| module | what it does |
|---|---|
| needs | what the opener must be able to do for a policy |
| listen | the listening socket: systemd's, or bound in place |
| filters | the children's seccomp filters |
| state | the folder of the stored messages |
| start | the children, each with its orders and exactly its descriptors |
| service | signals, reload, watchdog, stop |
| notify | sd_notify(3) |
"""
