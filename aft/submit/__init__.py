"""Jobs on a SLURM cluster: ``python -m aft.submit --nodes 2 -- fit -c configs/methods/tecoa.yaml``; see docs/cluster.md."""
