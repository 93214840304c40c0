"""DeepSpeed's defects that `arsg_dist.deepspeed.repair` mends, each as a script of plain DeepSpeed and torch's AdamW."""
