"""Work that takes longer than a request: merges and bakes as rows, run in child processes.

models      the rows: Job, Recipe, Edge
schemas     what requests and answers look like
queue       the protocol: claim, beat, hand back, finish; every change conditional on the fence
inputs      REFs of a recipe -> commits and blobs of this hub; scratch folders of links
service     submit, read, list, cancel
child       `python -m hub.jobs.child`: the only place of the hub where tensors are computed
process     starting, hearing and ending that child
dispatcher  claim -> child -> publish, in threads of the server or in `graft worker`
results     checks a child's output and publishes it with its card and lineage
events      the changes of one job as server-sent events
routes      the HTTP surface

Order of imports: models <- schemas, queue <- inputs, service <- results <- dispatcher; routes on top.
"""
