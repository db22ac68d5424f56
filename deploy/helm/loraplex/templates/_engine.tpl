{{/* Engines: their settings, and the pods that a deployment or a leader-worker set makes of them. */}}

{{/* The settings of a group, as YAML. Takes root and own, what `engines` says of it. */}}
{{- define "loraplex.engineGroup" -}}
{{- $e := mergeOverwrite (deepCopy .root.Values.engineDefaults) (default dict .own) -}}
{{- $degree := int $e.tensorParallel -}}
{{- if and (gt $degree 1) (eq $e.device "cuda") }}
{{- fail (printf "engines.%s.tensorParallel is %d with device cuda: engines divide a model among CPUs only, set device: cpu or tensorParallel: 1" .group $degree) }}{{ end }}
{{- include "loraplex.checkOwn" (dict "path" (printf "engines.%s" .group) "options" $e.options "pod" $e.pod) }}
{{- if and $e.autoscaling.enabled (gt (int $e.autoscaling.minReplicas) (int $e.autoscaling.maxReplicas)) }}
{{- fail (printf "engines.%s.autoscaling.minReplicas %d is more than maxReplicas %d" .group (int $e.autoscaling.minReplicas) (int $e.autoscaling.maxReplicas)) }}{{ end }}
{{- toYaml $e }}
{{- end }}

{{/* Takes root, group, e (its settings) and what the shared templates take of a part. */}}
{{- define "loraplex.enginePod" -}}
{{- $root := .root -}}
{{- $e := .e -}}
{{- $part := . -}}
{{- $tls := ne $root.Values.credentials.mode "mesh" -}}
{{- $isGpu := eq $e.device "cuda" -}}
metadata:
  labels: {{ include "loraplex.labels" $part | nindent 4 }}
    loraplex/engines: {{ .group }}
    {{- with $e.pod.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $e.pod.annotations }}
  annotations: {{ toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "loraplex.serviceAccount" $root }}
  automountServiceAccountToken: false
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with $e.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add $e.drainSettleS $e.drainGraceS 15 }}
  securityContext: {{ include "loraplex.podSecurity" $root | nindent 4 }}
  {{- include "loraplex.placement" $part | nindent 2 }}
  {{- include "loraplex.fetchModel" $root | nindent 2 }}
  containers:
    - name: engine
      image: {{ include "loraplex.image" (dict "root" $root "image" ($e.imageName | default (ternary "engine-gpu" "engine" $isGpu))) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- with include "loraplex.args" $part }}
      args: {{ . | nindent 8 }}
      {{- end }}
      env:
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: LORAPLEX_ENGINE_ADVERTISE, value: $(POD_IP)}
        {{- include "loraplex.env" $part | nindent 8 }}
        - {name: LORAPLEX_ENGINE_DEVICE, value: {{ $e.device }}}
        {{- if gt (int $e.tensorParallel) 1 }}
        - {name: LORAPLEX_ENGINE_TENSOR_PARALLEL, value: {{ $e.tensorParallel | quote }}}
        {{- end }}
        - {name: LORAPLEX_ENGINE_DRAIN_SETTLE_S, value: {{ $e.drainSettleS | quote }}}
        - {name: LORAPLEX_ENGINE_DRAIN_GRACE_S, value: {{ $e.drainGraceS | quote }}}
        {{- with $e.poolBytes }}
        - {name: LORAPLEX_ENGINE_POOL_BYTES, value: {{ include "loraplex.number" . | quote }}}
        {{- end }}
        {{- with $e.arenaBytes }}
        - {name: LORAPLEX_ENGINE_ARENA_BYTES, value: {{ include "loraplex.number" . | quote }}}
        {{- end }}
      ports:
        - {name: grpc, containerPort: 8520}
        - {name: metrics, containerPort: 8521}
      startupProbe:
        httpGet: {port: metrics, path: /healthz}
        periodSeconds: 5
        failureThreshold: {{ div $e.startupS 5 }}
      livenessProbe: {httpGet: {port: metrics, path: /healthz}, periodSeconds: 10, failureThreshold: 3, timeoutSeconds: 5}
      readinessProbe:
        {{- include "loraplex.probe" (dict "tls" $tls "port" 8520 "service" "readiness") | nindent 8 }}
        periodSeconds: 5
      resources:
        {{- $resources := deepCopy $e.resources }}
        {{- if $isGpu }}
        {{- $_ := set $resources "limits" (merge (dict $e.gpuResource 1) (default dict $resources.limits)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      securityContext: {{ include "loraplex.containerSecurity" $root | nindent 8 }}
      volumeMounts: {{ include "loraplex.mounts" $part | nindent 8 }}
  volumes: {{ include "loraplex.volumes" $part | nindent 4 }}
{{- end }}
