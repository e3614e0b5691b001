// For programs without Python, which have no other way to ask which fusedcnn they have loaded.
extern "C" [[gnu::visibility("default")]] const char* fusedcnn_version() {
  return FUSEDCNN_VERSION;
}
