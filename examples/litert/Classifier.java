import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;

/**
 * A .tflite file in LiteRT, through its C interface (classifier_jni.cc), as one does in an Android application with native
 * code, and on a desktop or server, where LiteRT has no Java interface of its own.
 */
public final class Classifier implements AutoCloseable {
  static {
    System.loadLibrary("classifier");
  }

  private long handle;

  public Classifier(String path) {
    handle = load(path);
  }

  /** The output for an input, both in row-major order. */
  public synchronized float[] classify(float[] input) {
    if (handle == 0) throw new IllegalStateException("closed");
    return run(handle, input);
  }

  @Override
  public synchronized void close() {
    release(handle);
    handle = 0;
  }

  private static native long load(String path);

  private static native float[] run(long handle, float[] input);

  private static native void release(long handle);

  /** Runs a model on a file of float32 values: MODEL INPUT OUTPUT. */
  public static void main(String[] arguments) throws Exception {
    byte[] bytes = Files.readAllBytes(Path.of(arguments[1]));
    float[] input = new float[bytes.length / Float.BYTES];
    ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(input);
    float[] output;
    try (Classifier classifier = new Classifier(arguments[0])) {
      output = classifier.classify(input);
    }
    ByteBuffer result = ByteBuffer.allocate(output.length * Float.BYTES).order(ByteOrder.LITTLE_ENDIAN);
    result.asFloatBuffer().put(output);
    Files.write(Path.of(arguments[2]), result.array());
  }
}
