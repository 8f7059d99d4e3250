target datalayout = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128"
target triple = "x86_64-unknown-linux-gnu"

define hidden i32 @dense(ptr %frame, ptr noalias %arg0, ptr noalias %arg1, ptr noalias %arg2) #0 {
entry:
  %buf11 = alloca [16 x float], align 32
  %buf48 = alloca [16 x float], align 32
  br label %loop1
loop1:
  %i3 = phi i64 [ 0, %entry ], [ %t101, %done5 ]
  br label %loop4
loop4:
  %i6 = phi i64 [ 0, %loop1 ], [ %t99, %join9 ]
  %t7 = icmp slt i64 %i6, 2
  br i1 %t7, label %then8, label %else10
then8:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf11, align 32
  %t12 = getelementptr inbounds float, ptr %buf11, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t12, align 32
  br label %loop13
loop13:
  %i15 = phi i64 [ 0, %then8 ], [ %t38, %loop13 ]
  %t16 = mul nsw i64 %i3, 10
  %t17 = add nsw i64 %t16, %i15
  %t18 = getelementptr inbounds float, ptr %arg0, i64 %t17
  %t19 = load float, ptr %t18, align 4
  %t20 = mul nsw i64 %i6, 8
  %t21 = mul nsw i64 %i15, 20
  %t22 = add nsw i64 %t20, %t21
  %t23 = getelementptr inbounds float, ptr %arg1, i64 %t22
  %t24 = load <8 x float>, ptr %t23, align 4
  %t25 = load <8 x float>, ptr %buf11, align 32
  %t26 = insertelement <8 x float> poison, float %t19, i64 0
  %t27 = shufflevector <8 x float> %t26, <8 x float> poison, <8 x i32> zeroinitializer
  %t28 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t27, <8 x float> %t24, <8 x float> %t25)
  store <8 x float> %t28, ptr %buf11, align 32
  %t29 = getelementptr inbounds float, ptr %t18, i64 5
  %t30 = load float, ptr %t29, align 4
  %t31 = load <8 x float>, ptr %t23, align 4
  %t32 = getelementptr inbounds float, ptr %buf11, i64 8
  %t33 = load <8 x float>, ptr %t32, align 32
  %t34 = insertelement <8 x float> poison, float %t30, i64 0
  %t35 = shufflevector <8 x float> %t34, <8 x float> poison, <8 x i32> zeroinitializer
  %t36 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t35, <8 x float> %t31, <8 x float> %t33)
  %t37 = getelementptr inbounds float, ptr %buf11, i64 8
  store <8 x float> %t36, ptr %t37, align 32
  %t38 = add nuw nsw i64 %i15, 1
  %t39 = icmp slt i64 %t38, 5
  br i1 %t39, label %loop13, label %done14
done14:
  %t40 = load <8 x float>, ptr %buf11, align 32
  %t41 = mul nsw i64 %i3, 40
  %t42 = mul nsw i64 %i6, 8
  %t43 = add nsw i64 %t41, %t42
  %t44 = getelementptr inbounds float, ptr %arg2, i64 %t43
  store <8 x float> %t40, ptr %t44, align 4
  %t45 = getelementptr inbounds float, ptr %buf11, i64 8
  %t46 = load <8 x float>, ptr %t45, align 32
  %t47 = getelementptr inbounds float, ptr %t44, i64 20
  store <8 x float> %t46, ptr %t47, align 4
  br label %join9
else10:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf48, align 32
  %t49 = getelementptr inbounds float, ptr %buf48, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t49, align 32
  br label %loop50
loop50:
  %i52 = phi i64 [ 0, %else10 ], [ %t84, %loop50 ]
  %t53 = mul nsw i64 %i6, 8
  %t54 = insertelement <8 x i64> poison, i64 %t53, i64 0
  %t55 = shufflevector <8 x i64> %t54, <8 x i64> poison, <8 x i32> zeroinitializer
  %t56 = add <8 x i64> %t55, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>
  %t57 = icmp slt <8 x i64> %t56, splat (i64 20)
  %t58 = mul nsw i64 %i3, 10
  %t59 = add nsw i64 %t58, %i52
  %t60 = getelementptr inbounds float, ptr %arg0, i64 %t59
  %t61 = load float, ptr %t60, align 4
  %t62 = mul nsw i64 %i52, 20
  %t63 = add nsw i64 %t53, %t62
  %t64 = getelementptr inbounds float, ptr %arg1, i64 %t63
  %t65 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t64, <8 x i1> %t57, <8 x float> zeroinitializer)
  %t66 = load <8 x float>, ptr %buf48, align 32
  %t67 = insertelement <8 x float> poison, float %t61, i64 0
  %t68 = shufflevector <8 x float> %t67, <8 x float> poison, <8 x i32> zeroinitializer
  %t69 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t68, <8 x float> %t65, <8 x float> %t66)
  %t70 = load <8 x float>, ptr %buf48, align 32
  %t71 = select <8 x i1> %t57, <8 x float> %t69, <8 x float> %t70
  store <8 x float> %t71, ptr %buf48, align 32
  %t72 = getelementptr inbounds float, ptr %t60, i64 5
  %t73 = load float, ptr %t72, align 4
  %t74 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t64, <8 x i1> %t57, <8 x float> zeroinitializer)
  %t75 = getelementptr inbounds float, ptr %buf48, i64 8
  %t76 = load <8 x float>, ptr %t75, align 32
  %t77 = insertelement <8 x float> poison, float %t73, i64 0
  %t78 = shufflevector <8 x float> %t77, <8 x float> poison, <8 x i32> zeroinitializer
  %t79 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t78, <8 x float> %t74, <8 x float> %t76)
  %t80 = getelementptr inbounds float, ptr %buf48, i64 8
  %t81 = load <8 x float>, ptr %t80, align 32
  %t82 = select <8 x i1> %t57, <8 x float> %t79, <8 x float> %t81
  %t83 = getelementptr inbounds float, ptr %buf48, i64 8
  store <8 x float> %t82, ptr %t83, align 32
  %t84 = add nuw nsw i64 %i52, 1
  %t85 = icmp slt i64 %t84, 5
  br i1 %t85, label %loop50, label %done51
done51:
  %t86 = mul nsw i64 %i6, 8
  %t87 = insertelement <8 x i64> poison, i64 %t86, i64 0
  %t88 = shufflevector <8 x i64> %t87, <8 x i64> poison, <8 x i32> zeroinitializer
  %t89 = add <8 x i64> %t88, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>
  %t90 = icmp slt <8 x i64> %t89, splat (i64 20)
  %t91 = load <8 x float>, ptr %buf48, align 32
  %t92 = mul nsw i64 %i3, 40
  %t93 = mul nsw i64 %i6, 8
  %t94 = add nsw i64 %t92, %t93
  %t95 = getelementptr inbounds float, ptr %arg2, i64 %t94
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t91, ptr align 4 %t95, <8 x i1> %t90)
  %t96 = getelementptr inbounds float, ptr %buf48, i64 8
  %t97 = load <8 x float>, ptr %t96, align 32
  %t98 = getelementptr inbounds float, ptr %t95, i64 20
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t97, ptr align 4 %t98, <8 x i1> %t90)
  br label %join9
join9:
  %t99 = add nuw nsw i64 %i6, 1
  %t100 = icmp slt i64 %t99, 3
  br i1 %t100, label %loop4, label %done5
done5:
  %t101 = add nuw nsw i64 %i3, 1
  %t102 = icmp slt i64 %t101, 3
  br i1 %t102, label %loop1, label %done2
done2:
  ret i32 0
}

declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare <8 x float> @llvm.masked.load.v8f32.p0(ptr, <8 x i1>, <8 x float>)
declare void @llvm.masked.store.v8f32.p0(<8 x float>, ptr, <8 x i1>)

attributes #0 = { nounwind "no-builtins" "tune-cpu"="x86-64-v3" "prefer-vector-width"="256" "min-legal-vector-width"="256" }

!llvm.module.flags = !{!0, !1}
!0 = !{i32 8, !"PIC Level", i32 2}
!1 = !{i32 7, !"uwtable", i32 0}
