import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import ai.onnxruntime.TensorInfo;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Map;

/**
 * An .onnx or .ort file in ONNX Runtime: `com.microsoft.onnxruntime:onnxruntime-android` of Maven on Android,
 * `com.microsoft.onnxruntime:onnxruntime` elsewhere, with the same classes.
 *
 * <pre>
 * javac -cp onnxruntime.jar Classifier.java
 * java -cp onnxruntime.jar:. Classifier model.onnx image.f32 logits.f32
 * </pre>
 */
public final class Classifier implements AutoCloseable {
  private final OrtEnvironment environment = OrtEnvironment.getEnvironment();
  private final OrtSession session;
  private final String input;
  private final long[] shape;

  public Classifier(String path) throws OrtException {
    session = environment.createSession(path, new OrtSession.SessionOptions());
    input = session.getInputNames().iterator().next();
    TensorInfo info = (TensorInfo) session.getInputInfo().get(input).getInfo();
    // One image, where the batch varies.
    shape = Arrays.stream(info.getShape()).map(size -> Math.max(size, 1)).toArray();
  }

  /** The output for an input, both in row-major order. */
  public float[] classify(FloatBuffer values) throws OrtException {
    try (OnnxTensor given = OnnxTensor.createTensor(environment, values, shape);
        OrtSession.Result results = session.run(Map.of(input, given))) {
      FloatBuffer found = ((OnnxTensor) results.get(0)).getFloatBuffer();
      float[] output = new float[found.remaining()];
      found.get(output);
      return output;
    }
  }

  @Override
  public void close() throws OrtException {
    session.close();
  }

  /** Runs a model on a file of float32 values: MODEL INPUT OUTPUT. */
  public static void main(String[] arguments) throws Exception {
    byte[] bytes = Files.readAllBytes(Path.of(arguments[1]));
    FloatBuffer input = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
    float[] output;
    try (Classifier classifier = new Classifier(arguments[0])) {
      output = classifier.classify(input);
    }
    ByteBuffer result = ByteBuffer.allocate(output.length * Float.BYTES).order(ByteOrder.LITTLE_ENDIAN);
    result.asFloatBuffer().put(output);
    Files.write(Path.of(arguments[2]), result.array());
  }
}
