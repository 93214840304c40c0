"""DeepSpeed's defects that `arsg_dist.deepspeed.repair` mends, each as a script of DeepSpeed and torch's AdamW."""
