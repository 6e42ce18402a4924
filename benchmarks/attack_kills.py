def kills(folder, options):
    raise NotImplementedError
