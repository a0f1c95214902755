"""The inspection world: products with drawn defects, exact masks, and the normal image of every defective one."""
