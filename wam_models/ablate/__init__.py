"""The ablation of the interaction programs in simulators: one protocol, resumable runs, a report from stored rows."""
