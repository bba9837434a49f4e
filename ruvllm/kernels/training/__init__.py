"""What training needs: backward passes, the loss, AdamW."""
