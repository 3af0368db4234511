"""The compiled scanner of serialized samples: protobuf's wire format straight into columns, without message objects."""
