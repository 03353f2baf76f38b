"""Pictures and weights become maps side by side, with their measures: contact sheet, table, tensors."""
